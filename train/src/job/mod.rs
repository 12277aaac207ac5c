//! A whole run, pretraining or fine-tuning: from the configuration to the summary.

mod adapter;
mod device;
mod error;
mod logs;
mod material;
mod setup;
mod start;
mod subject;
mod training;

pub use device::{device, set_threads};
pub use error::JobError;
pub(crate) use setup::{cycle, model_folder, optimizer, optimizer_options};
pub use setup::{model_config, prepare_data, prepare_options};
pub(crate) use start::sizes;
pub use training::{Finished, Training};
