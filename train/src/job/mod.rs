//! A whole pretraining run: from the configuration to the summary.

mod device;
mod error;
mod logs;
mod pretrain;
mod setup;
mod start;

pub use device::{device, set_threads};
pub use error::JobError;
pub use pretrain::{Finished, Pretrain};
pub use setup::{model_config, prepare_data, prepare_options};
