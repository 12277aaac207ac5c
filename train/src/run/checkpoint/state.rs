//! How far a run is.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use super::disk::Disk;

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
    /// Last validation loss in nats, on the batches that all validation losses of the run are measured on.
    pub validation_loss: Option<f64>,
    /// Lowest of them.
    pub best_validation_loss: Option<f64>,
    /// Its step.
    pub best_step: Option<u64>,
    /// Tensors in the optimizer's state.
    pub optimizer_tensors: usize,
    /// Tensors in the states of hooks that have any.
    #[serde(default)]
    pub hook_tensors: BTreeMap<String, usize>,
    /// Number of the stage that the run is in, from 0.
    #[serde(default)]
    pub stage: usize,
    /// Steps taken before that stage.
    #[serde(default)]
    pub stage_step: u64,
    /// Samples seen before that stage.
    #[serde(default)]
    pub stage_samples: u64,
    /// The stages of the run.
    #[serde(default)]
    pub stages: Vec<StageRecord>,
    /// Hash of the model folder that the run started from, if it did.
    pub base: Option<String>,
    /// Hash of the adapter folder that the run started from, if it did.
    pub adapter: Option<String>,
    /// Steps that the learning rate of the stage is laid out for: fewer than planned where the clock ends the run.
    pub total_steps: Option<u64>,
    /// Instruction set of the process that saved it; empty in older checkpoints.
    #[serde(default)]
    pub instruction_set: String,
    /// The settings that decide the result.
    pub settings: BTreeMap<String, String>,
}

/// A stage of a run, as far as a resumed run must have the same one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Its name.
    pub name: String,
    /// Hash of all that is learned from.
    pub data: String,
    /// Hash of what is held out.
    pub held_out: String,
    /// Steps of the stage as planned; none when only the clock ends it.
    pub steps: Option<u64>,
}

impl TrainerState {
    /// Notes a validation loss of a step. Returns whether it is the best so far, which a loss that is not finite never is.
    pub fn note_validation(&mut self, step: u64, loss: f64) -> bool {
        self.validation_loss = Some(loss);
        let best = loss.is_finite() && self.best_validation_loss.is_none_or(|best| loss < best);
        if best {
            (self.best_validation_loss, self.best_step) = (Some(loss), Some(step));
        }
        best
    }

    /// Reads the state of a checkpoint folder.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join(NAME);
        let text = std::fs::read_to_string(&path).map_err(CheckpointError::io(&path))?;
        serde_json::from_str(&text).map_err(|error| CheckpointError::damaged(&path, error.to_string()))
    }

    /// Writes the state into a checkpoint folder.
    pub(super) fn write(&self, dir: &Path, disk: &dyn Disk) -> Result<(), CheckpointError> {
        let path = dir.join(NAME);
        let text = match serde_json::to_string_pretty(self) {
            Ok(text) => text,
            Err(error) => unreachable!("a struct of numbers and texts is JSON: {error}"),
        };
        disk.write(&path, text.as_bytes()).map_err(CheckpointError::io(&path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_is_not_finite_is_never_the_best() {
        let mut state = TrainerState::default();
        let best: Vec<bool> = [f64::NAN, 3.0, 4.0, f64::NEG_INFINITY, 2.0]
            .iter()
            .zip(1..)
            .map(|(loss, step)| state.note_validation(step, *loss))
            .collect();
        assert_eq!(best, [false, true, false, false, true]);
        assert_eq!((state.best_validation_loss, state.best_step), (Some(2.0), Some(5)));
    }
}
