//! Parts shared by reading and writing adapter folders: file names, marks, and the adapter of a name on a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::module::Module;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use lowrank_adapters::{Adapter, AdapterOptions, Scaling, Size, each_adapter};

/// Name of the configuration.
pub(super) const CONFIG: &str = "adapter_config.json";
/// Name of the tensors.
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";
/// Prefix of the path of a layer in the name of a tensor.
pub(super) const MODEL: &str = "base_model.model.";
/// Prefix of the name of a tensor that all layers share.
pub(super) const SHARED: &str = "base_model.";
/// Our key in the configuration and in the header of the tensors.
pub(super) const OURS: &str = "lowrank";

/// Settings that `peft` has no key for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Ours {
    pub structure: String,
    pub init: String,
    pub scaling: Option<Scaling>,
    pub seed: u64,
    pub options: AdapterOptions,
}

/// Metadata in the header of the tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Mark {
    /// Fingerprint of the base weights that the adapter was trained on.
    pub base: Option<String>,
    /// Fingerprint of the tensors that all layers share, where they are not in the file but recomputed from the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<String>,
    /// Rank and scale of layers that differ from the configuration, because the adapter changed its size in a run.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sizes: BTreeMap<String, Size>,
    /// `[d_in, d_out]` of the layers, where they cannot be derived from the tensors.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shapes: BTreeMap<String, [usize; 2]>,
    /// Layers that are embeddings, where the names of their tensors do not show it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub embeddings: BTreeSet<String>,
    /// Settings that the configuration does not hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Ours>,
}

pub(super) fn digits(number: u64) -> String {
    format!("{number:016x}")
}

/// The folder of one of several adapters in `dir`: `dir` itself for "default", the sub-folder of its name for others, as in `peft`.
pub fn adapter_dir(dir: &Path, name: &str) -> Result<PathBuf, ModelError> {
    let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
    match (name, plain) {
        ("default", _) => Ok(dir.to_path_buf()),
        (_, true) => Ok(dir.join(name)),
        _ => Err(ModelError::Config(format!("\"{name}\" cannot be the name of a folder; give the adapter another"))),
    }
}

/// An adapter on its layers, by name.
pub(super) fn attached<M: Module>(module: &M, name: &str) -> BTreeMap<String, Adapter> {
    let mut found = BTreeMap::new();
    each_adapter(module, |path, adapter| {
        if let Some(attached) = adapter.stack.iter().find(|attached| attached.control().name() == name) {
            found.insert(path.to_string(), attached.clone());
        }
    });
    found
}
