//! Checkpoints: folders that are complete or not there.
//!
//! A checkpoint is a Hugging Face model folder with the optimizer's state (`optimizer.bpk`), the trainer's state (`trainer.json`) and a
//! manifest with the size and SHA-256 of every file. It is written beside and renamed into place.

mod error;
mod manifest;
mod optimizer;
mod rotation;
mod state;

pub use error::CheckpointError;
pub use manifest::{Manifest, verify};
pub use optimizer::{load_optimizer, save_optimizer};
pub use rotation::Checkpoints;
pub use state::TrainerState;
