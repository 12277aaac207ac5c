//! Recipes: what a run learns from, what it trains and how it starts.

mod data;
mod files;
mod finetune;
mod model;
mod pretrain;

pub use data::{HeldOut, RunData, SampleStart};
pub use files::{ModelFiles, RecordError, RecordFiles};
pub use model::{TrainedFiles, TrainedModel};
