//! Model folders as Hugging Face's `transformers` writes and reads them: `config.json` and `model.safetensors`, whole or in shards. Adapter folders
//! are in [`peft`].

mod config;
mod open;
pub mod peft;
mod read;
mod rope;
mod write;

pub use config::HubConfig;
pub use read::{ModelFolder, TensorFiles, read_header};
pub use write::{MAX_SHARD_BYTES, copy_companions, save};

/// Name of the index that maps tensors to shards.
const INDEX: &str = "model.safetensors.index.json";
/// Name of the weights when they are in one file.
const WEIGHTS: &str = "model.safetensors";
/// Name of the configuration.
const CONFIG: &str = "config.json";
