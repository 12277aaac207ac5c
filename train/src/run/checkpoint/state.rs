//! Progress of a run.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use super::disk::Disk;

/// Name of the file.
const NAME: &str = "trainer.json";

/// State of the trainer in addition to weights and optimizer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Number of steps taken.
    pub step: u64,
    /// Number of samples seen; the position in the order of the data.
    pub samples: u64,
    /// Number of tokens that were not ignored.
    pub tokens: u64,
    /// Number of skipped steps.
    pub skipped_steps: u64,
    /// Seconds of training, over all processes.
    pub seconds: f64,
    /// Loss of the last step in nats.
    pub train_loss: Option<f64>,
    /// Last validation loss in nats, on the batches used for all validation losses of the run.
    pub validation_loss: Option<f64>,
    /// Lowest validation loss.
    pub best_validation_loss: Option<f64>,
    /// Step of the lowest validation loss.
    pub best_step: Option<u64>,
    /// Number of tensors in the optimizer's state.
    pub optimizer_tensors: usize,
    /// Number of tensors in the states of hooks that have any.
    #[serde(default)]
    pub hook_tensors: BTreeMap<String, usize>,
    /// Index of the current stage, from 0.
    #[serde(default)]
    pub stage: usize,
    /// Steps taken before that stage.
    #[serde(default)]
    pub stage_step: u64,
    /// Samples seen before that stage.
    #[serde(default)]
    pub stage_samples: u64,
    /// Stages of the run.
    #[serde(default)]
    pub stages: Vec<StageRecord>,
    /// Hash of the model folder that the run started from, if any.
    pub base: Option<String>,
    /// Hash of the adapter folder that the run started from, if any.
    pub adapter: Option<String>,
    /// Number of steps of the stage's learning-rate schedule: fewer than planned if a time limit ends the run.
    pub total_steps: Option<u64>,
    /// Time limit in minutes that the number of steps follows; 0 for none.
    #[serde(default)]
    pub minutes: f64,
    /// Instruction set of the process that saved the checkpoint; empty in older checkpoints.
    #[serde(default)]
    pub instruction_set: String,
    /// Settings that determine the result.
    pub settings: BTreeMap<String, String>,
}

/// Properties of a stage that a resumed run must share.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Name of the stage.
    pub name: String,
    /// Hash of the training data.
    pub data: String,
    /// Hash of the held-out data.
    pub held_out: String,
    /// Planned steps of the stage; none if only a time limit ends it.
    pub steps: Option<u64>,
}

impl TrainerState {
    /// Records the validation loss of a step. Returns true if it is the best so far, which a non-finite loss never is.
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
