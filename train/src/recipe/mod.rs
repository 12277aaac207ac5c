//! Recipes: what a run learns from, what it trains and how it starts.

mod data;
mod files;
mod finetune;
mod model;
mod model_text;
mod pretrain;

pub use data::{HeldOut, RunData, SampleStart};
pub use files::{ModelFiles, RecordError, RecordFiles};
pub use finetune::ReadExamples;
pub use model::{TrainedFiles, TrainedModel};
pub use model_text::{ModelText, check_vocabulary};
