//! Checkpoints: folders that are complete or not there.
//!
//! A checkpoint is a Hugging Face model folder, or the folder of an adapter alone, with the states of optimizer and training rule
//! (their tensors in `optimizer.safetensors` and `rule.safetensors`, their counters in `optimizer.bpk` and `rule.bpk`), the trainer's state
//! (`trainer.json`) and a manifest with the size and SHA-256 of every file. It is written beside and renamed into place.

mod error;
mod manifest;
mod optimizer;
mod rotation;
mod state;
mod state_file;

pub use error::CheckpointError;
pub use manifest::{Manifest, folder_hash, verify};
pub use optimizer::{load_optimizer, load_rule, save_optimizer, save_rule};
pub use rotation::Checkpoints;
pub use state::TrainerState;
