//! Settings of a training.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Schedule;

/// How gradients are computed; the numbers are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BackwardMode {
    /// All blocks at once: everything that they compute is kept.
    #[default]
    Whole,
    /// Block by block: only the inputs of the blocks are kept, and all gradients.
    Checkpointed,
    /// Block by block, and each block is updated at once: only its gradients are kept.
    PerLayer,
}

/// Settings of a [`Trainer`](super::Trainer) beyond model, optimizer and data.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerOptions {
    /// Learning-rate schedule.
    pub schedule: Schedule,
    /// Number of micro-batches whose gradients make one step.
    pub accumulation: usize,
    /// Global gradient clipping norm; none for no clipping.
    pub clip: Option<f64>,
    /// Maximum number of steps with a non-finite loss or gradient that may be skipped in the whole run.
    pub max_skipped_steps: u64,
    /// Mode of the backward pass.
    pub backward: BackwardMode,
    /// Per-block gradient clipping norm when blocks are updated one by one; none for no clipping.
    pub block_clip: Option<f64>,
}

impl TrainerOptions {
    /// Default options: one micro-batch per step, the whole backward pass at once, and no clipping.
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule,
            accumulation: 1,
            clip: None,
            max_skipped_steps: 0,
            backward: BackwardMode::Whole,
            block_clip: None,
        }
    }
}
