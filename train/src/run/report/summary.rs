//! `summary.json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::process::{MemoryUse, Peers};

/// Reason for the end of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndedBy {
    /// All steps are taken.
    Steps,
    /// The time of `train.minutes` is up.
    Clock,
    /// A signal.
    Signal,
}

/// Largest resident memory that was reached in each phase, where it exceeded all that had been before; none for a phase that never needed more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Peaks {
    /// Reading data, model and state.
    pub start: Option<u64>,
    /// Steps.
    pub step: Option<u64>,
    /// Evaluations.
    pub evaluation: Option<u64>,
    /// Writing checkpoints.
    pub save: Option<u64>,
    #[serde(skip)]
    seen: u64,
}

impl Peaks {
    /// Notes the largest resident memory at the end of a phase.
    pub fn note(&mut self, phase: fn(&mut Self) -> &mut Option<u64>) {
        let peak = MemoryUse::now().peak;
        if peak > self.seen {
            *phase(self) = Some(peak);
            self.seen = peak;
        }
    }
}

/// Figures of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of steps taken.
    pub steps: u64,
    /// Number of tokens that were not ignored.
    pub tokens: u64,
    /// Seconds of training, without evaluation and saving.
    pub seconds: f64,
    /// Loss of the last step, nats per token.
    pub train_loss: Option<f64>,
    /// Reason for the end.
    pub ended_by: Option<EndedBy>,
    /// Last loss on the held-out batches used for all validation losses during a run, nats per token.
    pub validation_loss: Option<f64>,
    /// Lowest of these losses.
    pub best_validation_loss: Option<f64>,
    /// Loss on all held-out text at the end, nats per token.
    pub final_validation_loss: Option<f64>,
    /// Fraction of the held-out rows that are classified correctly at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_accuracy: Option<f64>,
    /// Bits the model needs for each byte of the held-out text.
    pub validation_bits_per_byte: Option<f64>,
    /// Bits that `gzip -9` needs for each byte of the same text.
    pub gzip_bits_per_byte: Option<f64>,
    /// Tokens per second of training.
    pub tokens_per_second: f64,
    /// Largest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// The same by phase.
    #[serde(default)]
    pub peaks: Peaks,
    /// Expected peak, if the run has a memory limit.
    pub forecast_bytes: Option<u64>,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of all gradients.
    pub gradient_bytes: u64,
    /// Maximum bytes that a forward pass kept for the backward pass.
    pub activation_bytes: Option<u64>,
    /// Maximum bytes that the device's memory pool had reserved.
    pub device_reserved_bytes: Option<u64>,
    /// Bytes of the optimizer's state; of several processes, in the one that holds most.
    pub optimizer_state_bytes: u64,
    /// Bytes of the optimizer's state in each of several processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub process_state_bytes: Vec<u64>,
    /// Number of steps skipped because of a non-finite value.
    pub skipped_steps: u64,
    /// Number of trainable parameters.
    pub parameters: u64,
    /// Instruction set of loops and matrix products on the CPU.
    #[serde(default)]
    pub instruction_set: String,
    /// Name that the driver gives to the GPU of the run; none for the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Number of subspace renewals that kept the previous subspace, because the gradient was zero or not finite.
    #[serde(default)]
    pub kept_subspaces: u64,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
}

impl Summary {
    /// Notes the bytes of optimizer state in this process; all processes do so together.
    pub fn note_state(&mut self, peers: Peers, bytes: u64) {
        let all = peers.all(&[bytes]).concat();
        self.optimizer_state_bytes = all.iter().copied().max().unwrap_or(bytes);
        self.process_state_bytes = if peers.is_alone() { Vec::new() } else { all };
    }
}
