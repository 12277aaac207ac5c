//! `summary.json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
    /// Bytes of the optimizer's state.
    pub optimizer_state_bytes: u64,
    /// Number of steps skipped because of a non-finite value.
    pub skipped_steps: u64,
    /// Number of trainable parameters.
    pub parameters: u64,
    /// Instruction set of loops and matrix products on the CPU.
    #[serde(default)]
    pub instruction_set: String,
    /// Number of subspace renewals that kept the previous subspace, because the gradient was zero or not finite.
    #[serde(default)]
    pub kept_subspaces: u64,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
}
