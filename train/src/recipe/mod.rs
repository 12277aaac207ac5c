//! Recipes: the stages of a run in order, each with its data, objective, hooks and end, and the trained model.

mod data;
mod files;
mod finetune;
mod images;
mod llama;
mod memory;
mod model;
mod model_text;
mod pretrain;
mod stage;
mod vision;

pub use data::{RunData, SampleStart};
pub use files::{ModelFiles, RecordError, RecordFiles};
pub use finetune::ReadExamples;
pub use model::{TrainedFiles, TrainedModel};
pub use model_text::{ModelText, check_vocabulary};
pub use stage::{NamedStream, Recipe, Stage};
pub use vision::{ImageData, ImageHub, ImageModel, LABELS, adapter_labels};
