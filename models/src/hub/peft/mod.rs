//! Adapter folders as Python's `peft` writes and reads them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! What `peft` has is exchanged in its names and layouts (`layout.rs` lists them). What it has not goes through the same kind of folder with a
//! `peft_type` of its own, so that `peft` refuses it; options then stand under the key `lowrank` of the configuration. What `peft` has no key for
//! stands in the header of the tensors: a number for the base weights that the adapter was trained on, seeds and options. Files without it are
//! read as well.

mod brought;
mod config;
mod factors;
mod folder;
mod keys;
mod layout;
mod ordered;
mod read;
mod write;

pub use factors::FolderFactors;
pub use folder::adapter_dir;
pub use read::PeftFolder;
pub use write::{Form, save};
