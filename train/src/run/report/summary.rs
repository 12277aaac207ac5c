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
    /// Steps taken.
    pub steps: u64,
    /// Tokens that counted.
    pub tokens: u64,
    /// Seconds of training, evaluation and saving left out.
    pub seconds: f64,
    /// Loss of the last step, nats a token.
    pub train_loss: Option<f64>,
    /// Reason for the end.
    pub ended_by: Option<EndedBy>,
    /// Last loss on the held-out batches that all validation losses during a run are measured on, nats a token.
    pub validation_loss: Option<f64>,
    /// Lowest of these losses.
    pub best_validation_loss: Option<f64>,
    /// Loss on all held-out text at the end, nats a token.
    pub final_validation_loss: Option<f64>,
    /// Bits the model needs for each byte of the held-out text.
    pub validation_bits_per_byte: Option<f64>,
    /// Bits that `gzip -9` needs for each byte of the same text.
    pub gzip_bits_per_byte: Option<f64>,
    /// Tokens a second of training.
    pub tokens_per_second: f64,
    /// Largest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// What the peak was expected to be, where the run was given a limit.
    pub forecast_bytes: Option<u64>,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of all gradients.
    pub gradient_bytes: u64,
    /// Most bytes that a forward pass left for the backward pass.
    pub activation_bytes: Option<u64>,
    /// Most bytes that the device's memory pool had reserved.
    pub device_reserved_bytes: Option<u64>,
    /// Bytes of the optimizer's state.
    pub optimizer_state_bytes: u64,
    /// Steps passed over because of a non-finite value.
    pub skipped_steps: u64,
    /// Trainable values.
    pub parameters: u64,
    /// Instruction set of loops and matrix products on the CPU.
    #[serde(default)]
    pub instruction_set: String,
    /// Renewals of a subspace that kept the one before, because the gradient was zero or not finite.
    #[serde(default)]
    pub kept_subspaces: u64,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
}
