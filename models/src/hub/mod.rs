//! Model folders as Hugging Face's `transformers` writes and reads them: `config.json` and `model.safetensors`, whole or in shards. Adapter folders
//! are in [`peft`], compositions of them in [`compose`].

mod companions;
pub mod compose;
mod config;
mod family;
mod file_type;
mod four_bit;
mod generation;
pub mod gguf;
mod keys;
mod names;
mod narrow;
mod open;
pub mod peft;
mod read;
mod rope;
mod rounding;
mod spool;
mod tensor_files;
mod vision;
mod vision_config;
mod vision_names;
mod write;

pub use companions::{CHAT_TEMPLATE, FURTHER_TEMPLATES, companion, copy_companions};
pub use config::HubConfig;
pub use file_type::{FileType, FileTypes};
pub use generation::Generation;
pub use read::ModelFolder;
pub use rounding::{RoundingCost, without_codes};
pub use tensor_files::{TensorFiles, read_header};
pub use vision::{VisionFolder, VisionModel, save_vision};
pub use vision_config::{VisionHub, VisionShape};
pub use vision_names::{vit_file_name, vit_module_name};
pub use write::{MAX_SHARD_BYTES, save, save_as, save_trained};
