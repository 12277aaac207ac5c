//! Names of the files in a model folder.

/// Name of the index that maps tensors to shards.
pub const INDEX: &str = "model.safetensors.index.json";
/// Name of the weights when they are in one file.
pub const WEIGHTS: &str = "model.safetensors";
/// Name of the configuration.
pub const CONFIG: &str = "config.json";
/// Name of the weights as they were trained, beside rounded ones.
pub const EXACT: &str = "weights-f32.safetensors";
