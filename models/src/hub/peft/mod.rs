//! Adapter folders as Python's `peft` writes and reads them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Structures that `peft` supports are exchanged in its names and layouts (`layouts.rs` lists them). Others use the same kind of folder with a
//! `peft_type` of their own, so that `peft` rejects it, and options under the key `lowrank` of the configuration. The header of the tensors holds
//! what `peft` has no key for: a fingerprint of the base weights that the adapter was trained on, seeds and options. Files without it are read
//! as well.

mod adalora;
mod brought;
mod config;
mod distribute;
mod factors;
mod folder;
mod keys;
mod layout;
mod layouts;
mod names;
mod old_names;
mod ordered;
mod plain;
mod read;
mod saved;
mod write;
mod xlora;

pub use adalora::save_adalora;
pub use factors::FolderFactors;
pub use folder::adapter_dir;
pub use plain::{Besides, PlainLora, PlainSettings};
pub use read::PeftFolder;
pub use write::{Form, save, save_as};
pub use xlora::XLora;
