//! Options of IncreLoRA and what follows from them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Allocation IncreLoRA. The rank of the adapter is that at the start of each layer, 1 when not given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IncreLora {
    /// Average rank of the layers at the end.
    #[schemars(range(min = 1, max = 131_072))]
    pub target_rank: usize,
    /// Sum of the ranks of all layers at the end, instead of an average.
    #[schemars(range(min = 1))]
    pub total_rank: Option<usize>,
    /// Components that a layer gets at a time.
    #[schemars(range(min = 1, max = 131_072))]
    pub add_rank: usize,
    /// Layers that get components at a time.
    #[schemars(range(min = 1))]
    pub top_h: usize,
    /// Steps before the first growth.
    pub init_warmup: u64,
    /// Steps between growths.
    #[schemars(range(min = 1))]
    pub increment_interval: u64,
    /// Smoothing of the scores.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub beta_1: f64,
    /// Smoothing of their deviations.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub beta_2: f64,
    /// Weight gamma of the distance of the factors from being orthonormal.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub orth_weight: f64,
    /// Train the components that a layer gets next before it has them.
    pub advance_learn: bool,
    /// New components have the learning-rate schedule of a run that starts with them.
    pub restart_warmup: bool,
}

impl Default for IncreLora {
    fn default() -> Self {
        Self {
            target_rank: 2,
            total_rank: None,
            add_rank: 1,
            top_h: 2,
            init_warmup: 100,
            increment_interval: 100,
            beta_1: 0.85,
            beta_2: 0.85,
            orth_weight: 0.1,
            advance_learn: true,
            restart_warmup: true,
        }
    }
}

impl IncreLora {
    pub(super) fn target(&self, layers: usize) -> usize {
        self.total_rank.unwrap_or(self.target_rank * layers)
    }

    /// Returns true if layers grow at a step, counted from 0.
    pub(super) fn grows_at(&self, step: u64) -> bool {
        step > self.init_warmup && step.is_multiple_of(self.increment_interval)
    }

    /// Components that the growths of a run add at most.
    pub(super) fn reach(&self, total_steps: u64, layers: usize) -> usize {
        let last = total_steps.saturating_sub(1) / self.increment_interval;
        let events = last.saturating_sub(self.init_warmup / self.increment_interval);
        usize::try_from(events)
            .unwrap_or(usize::MAX)
            .saturating_mul(self.top_h.min(layers))
            .saturating_mul(self.add_rank)
    }
}
