//! Adapter folders as Python's `peft` writes and reads them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! What `peft` has is exchanged in its names and layouts (`layout.rs` lists them). What it has not goes through the same kind of folder with a
//! `peft_type` of its own, so that `peft` refuses it; options then stand under the key `lowrank` of the configuration. What `peft` has no key for
//! stands in the header of the tensors: a number for the base weights that the adapter was trained on, seeds and options. Files without it are
//! read as well.

mod config;
mod keys;
mod layout;
mod ordered;
mod read;
mod write;

pub use read::PeftFolder;
pub use write::{Form, adapter_dir, save};

use serde::{Deserialize, Serialize};

use crate::adapter::{AdapterOptions, Scaling};

/// Name of the configuration.
const CONFIG: &str = "adapter_config.json";
/// Name of the tensors.
const WEIGHTS: &str = "adapter_model.safetensors";
/// What stands before the path of a layer in the name of a tensor.
const MODEL: &str = "base_model.model.";
/// What stands before the name of a tensor that all layers share.
const SHARED: &str = "base_model.";
/// Our key in the configuration and in the header of the tensors.
const OURS: &str = "lowrank";

/// What `peft` has no key for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Ours {
    structure: String,
    init: String,
    scaling: Option<Scaling>,
    seed: u64,
    options: AdapterOptions,
}

/// What the header of the tensors says beside them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Mark {
    /// Number of the base weights that the adapter was trained on.
    base: Option<String>,
    /// Number of the tensors that all layers share, where they are not in the file but made again from the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shared: Option<String>,
    /// Settings that the configuration does not hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adapter: Option<Ours>,
}

fn digits(number: u64) -> String {
    format!("{number:016x}")
}
