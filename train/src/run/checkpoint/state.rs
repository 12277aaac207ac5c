//! How far a run is.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::CheckpointError;

/// Name of the file.
const NAME: &str = "trainer.json";

/// The state of the trainer beside weights and optimizer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps taken.
    pub step: u64,
    /// Samples seen; the place in the order of the data.
    pub samples: u64,
    /// Tokens that counted.
    pub tokens: u64,
    /// Steps passed over.
    pub skipped_steps: u64,
    /// Seconds of training, over all processes.
    pub seconds: f64,
    /// Loss of the last step in nats.
    pub train_loss: Option<f64>,
    /// Last validation loss in nats.
    pub validation_loss: Option<f64>,
    /// Lowest validation loss in nats.
    pub best_validation_loss: Option<f64>,
    /// Its step.
    pub best_step: Option<u64>,
    /// Tensors in the optimizer's state.
    pub optimizer_tensors: usize,
    /// Tensors in the states of hooks that have any.
    #[serde(default)]
    pub hook_tensors: BTreeMap<String, usize>,
    /// Hash of the training tokens.
    pub data: String,
    /// Hash of the model folder that an adapter stands on.
    #[serde(default)]
    pub base: Option<String>,
    /// Instruction set of the process that saved it; empty in older checkpoints.
    #[serde(default)]
    pub instruction_set: String,
    /// The settings that decide the result.
    pub settings: BTreeMap<String, String>,
}

impl TrainerState {
    /// Reads the state of a checkpoint folder.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join(NAME);
        let text = std::fs::read_to_string(&path).map_err(CheckpointError::io(&path))?;
        serde_json::from_str(&text).map_err(|error| CheckpointError::damaged(&path, error.to_string()))
    }

    /// Writes the state into a checkpoint folder.
    pub(super) fn write(&self, dir: &Path) -> Result<(), CheckpointError> {
        let path = dir.join(NAME);
        let text = match serde_json::to_string_pretty(self) {
            Ok(text) => text,
            Err(error) => unreachable!("a struct of numbers and texts is JSON: {error}"),
        };
        std::fs::write(&path, text).map_err(CheckpointError::io(&path))
    }
}
