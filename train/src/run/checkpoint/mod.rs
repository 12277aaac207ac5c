//! Checkpoints: folders that are either complete or absent.
//!
//! A checkpoint holds the model's own files ([`ModelFiles`](crate::recipe::ModelFiles): a Hugging Face folder, the folder of an adapter alone, or a record of Burn's), the
//! states of optimizer and hooks (their tensors in `optimizer.safetensors` and `hook-NAME.safetensors`, their counters in `optimizer.bpk` and
//! `hook-NAME.bpk`), the trainer's state (`trainer.json`) and a manifest with the size and SHA-256 of every file. It is written beside and
//! renamed into place.

mod disk;
mod error;
mod expected;
mod manifest;
mod optimizer;
mod rotation;
mod shards;
mod state;
mod state_file;
mod training;

pub use error::CheckpointError;
pub use expected::ExpectedState;
pub use manifest::{Manifest, folder_hash, verify};
pub use optimizer::{load_hooks, load_optimizer, save_hooks, save_optimizer, state_bytes};
pub use rotation::Checkpoints;
pub use state::{StageRecord, TrainerState};
pub use training::{restore_training, save_training, send_training};
