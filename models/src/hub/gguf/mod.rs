//! Model files of llama.cpp, GGUF: read with all types of tensors that are in common use, and written.
//!
//! [`ModelFolder`](super::ModelFolder) opens such a file in place of a folder; [`companion`](super::companion) gives its tokenizer and
//! configuration as the files of a folder. [`save_gguf`] writes a model, [`save_adapter_gguf`] an adapter.

mod adapter;
mod architecture;
mod config;
mod container;
mod dequantise;
mod names;
mod quantise;
mod rope;
mod save;
mod tokenizer;
mod types;
mod value;
mod weights;
mod write;

pub use adapter::{GgufAdapter, save_adapter_gguf};
pub use container::{GgufFile, is_gguf};
pub use quantise::quantised;
pub use save::{GgufReport, save_gguf};
pub use types::{BlockType, TensorType};
pub(super) use weights::{GgufWeights, configuration, files};
