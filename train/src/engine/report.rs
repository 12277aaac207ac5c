//! Figures of a step.

/// Results of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The step, counted from 1.
    pub step: u64,
    /// Weighted sum of the terms of the objective: for a language model with one term, the mean cross-entropy in nats
    /// over the tokens of the step.
    pub loss: f64,
    /// Mean loss of each term.
    pub terms: Vec<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Maximum bytes of gradients that existed at a time.
    pub gradient_bytes: u64,
    /// Maximum bytes that a forward pass kept for the backward pass, if the program's allocator or the device reports
    /// them.
    pub activation_bytes: Option<u64>,
    /// Number of tokens that were not ignored.
    pub tokens: u64,
    /// Wall time of the step in seconds.
    pub seconds: f64,
    /// Seconds of it spent reading the samples.
    pub data_seconds: f64,
    /// Bytes that this process has sent to sum gradients with others.
    pub sent_bytes: u64,
    /// Seconds of these sums, waiting for other processes included.
    pub communication_seconds: f64,
    /// True if the update was skipped because of a non-finite value.
    pub skipped: bool,
}
