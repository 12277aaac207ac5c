//! An adapter alone, in a folder.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::tensor::TensorData;
use lowrank_models::adapter::{AdapterConfig, Attach, GivenTensors, each_adapter};
use lowrank_models::{Llama, ModelError};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::CheckpointError;

const NAME: &str = "adapter_model.safetensors";

/// Writes the adapter of a model.
pub fn save_adapter(model: &Llama, dir: &Path) -> Result<(), CheckpointError> {
    let path = dir.join(NAME);
    let mut tensors = Vec::new();
    each_adapter(model, |layer, adapter| {
        for (tensor, data) in adapter.stack.iter().flat_map(|attached| attached.tensors()) {
            tensors.push((format!("{layer}/{}", tensor.field), data));
        }
    });
    let views: Vec<(String, TensorView)> = tensors
        .iter()
        .filter_map(|(name, data)| {
            let view = TensorView::new(Dtype::F32, data.shape().as_slice().to_vec(), data.as_bytes()).ok()?;
            Some((name.clone(), view))
        })
        .collect();
    std::fs::write(dir.join("adapter_config.json"), "{}").map_err(CheckpointError::io(dir))?;
    safetensors::serialize_to_file(views, Some(HashMap::new()), &path)
        .map_err(|error| CheckpointError::damaged(&path, error.to_string()))
}

/// Puts the adapter of a folder on a model.
pub fn load_adapter(model: Llama, config: &AdapterConfig, dir: &Path) -> Result<Llama, ModelError> {
    let path = dir.join(NAME);
    let bad = |reason: String| ModelError::File { path: path.clone(), reason };
    let bytes = std::fs::read(&path).map_err(|error| bad(error.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| bad(error.to_string()))?;
    let mut tensors: BTreeMap<String, GivenTensors> = BTreeMap::new();
    for (name, view) in file.tensors() {
        let (layer, field) = name.split_once('/').ok_or_else(|| bad(name.clone()))?;
        let values: Vec<f32> = view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let data = TensorData::new(values, view.shape().to_vec());
        tensors.entry(layer.to_string()).or_default().insert(field.to_string(), data);
    }
    Ok(model.attach(Attach::new(config.clone()).with_tensors(tensors))?.0)
}
