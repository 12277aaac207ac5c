//! Figures of a step.

/// What one step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The step, counted from 1.
    pub step: u64,
    /// Weighted sum of the terms of the objective: of a language model with one term the mean cross-entropy in nats over the tokens of the step.
    pub loss: f64,
    /// Mean loss of each term.
    pub terms: Vec<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Most bytes of gradients that existed at a time.
    pub gradient_bytes: u64,
    /// Most bytes that a forward pass left for the backward pass, where the program's allocator or the device tells.
    pub activation_bytes: Option<u64>,
    /// Tokens that counted.
    pub tokens: u64,
    /// Wall time of the step.
    pub seconds: f64,
    /// Those of them that went into reading the samples.
    pub data_seconds: f64,
    /// Whether the update was left out because of a non-finite value.
    pub skipped: bool,
}
