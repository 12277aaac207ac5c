//! Files of a model in a checkpoint.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;

/// Format in which a run saves its model.
pub trait ModelFiles<M> {
    /// Error of writing or reading.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Writes the model into the folder of a checkpoint.
    fn save(&self, model: &M, dir: &Path) -> Result<(), Self::Error>;

    /// Reads the model from the folder of a checkpoint, ready for training on this device.
    fn load(&self, dir: &Path, device: &Device) -> Result<M, Self::Error>;
}

/// Burn record, `model.bpk`, for models without a format of their own.
///
/// It holds tensors without structure: `start` is a model of the same shape, with the same adapters attached and the
/// same parameters frozen. Optimizer state is matched by parameter ids, which the record keeps.
#[derive(Clone, Debug)]
pub struct RecordFiles<M> {
    start: M,
}

/// Burn record that could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct RecordError {
    path: PathBuf,
    reason: String,
}

/// Name of the file.
const NAME: &str = "model.bpk";

impl<M: Module> RecordFiles<M> {
    /// Creates the format for models like this one.
    pub fn new(start: M) -> Self {
        Self { start }
    }
}

impl<M: Module> ModelFiles<M> for RecordFiles<M> {
    type Error = RecordError;

    fn save(&self, model: &M, dir: &Path) -> Result<(), RecordError> {
        let path = dir.join(NAME);
        let written = model.clone().save_file(&path);
        written.map_err(|error| RecordError { path, reason: error.to_string() })
    }

    fn load(&self, dir: &Path, device: &Device) -> Result<M, RecordError> {
        let path = dir.join(NAME);
        let read = self.start.clone().to_device(device).try_load_file(&path);
        read.map_err(|error| RecordError { path, reason: error.to_string() })
    }
}
