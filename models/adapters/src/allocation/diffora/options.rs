//! Options of the search.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Weights of the layers as functions of their logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SearchRelaxation {
    /// The logistic function of each logit.
    #[default]
    Sigmoid,
    /// The softmax over the layers of a block, with mean 1.
    Softmax,
}

/// Gradient of the logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SearchOrder {
    /// At the current factors.
    #[default]
    First,
    /// After a step of the factors, with the derivative of that step by finite differences.
    Second,
}

/// Layers that compete with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SearchScope {
    /// Those of a block.
    #[default]
    Row,
    /// All.
    Global,
}

/// Adapters of the layers that were not selected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// One pair of factors for all layers of a type.
    #[default]
    Pair,
    /// None: these layers stay frozen.
    None,
}

/// Allocation DiffoRA: a search over half of the examples, then training on all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DiffoRa {
    /// Fraction of the layers that keep an adapter of their own.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub rho: f64,
    /// Weights of the layers as functions of their logits.
    pub relaxation: SearchRelaxation,
    /// Gradient of the logits.
    pub order: SearchOrder,
    /// Learning rate of the inner step of the second order; the learning rate of the run if empty.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub xi: Option<f64>,
    /// Learning rate of the logits.
    #[schemars(range(max = 1e3), extend("exclusiveMinimum" = 0.0))]
    pub lr_theta: f64,
    /// Decoupled weight decay of the logits.
    #[schemars(range(min = 0.0, max = 1e3))]
    pub wd_theta: f64,
    /// Steps of the search; a seventh of the run if empty.
    #[schemars(range(min = 1))]
    pub search_steps: Option<u64>,
    /// Layers that compete with each other.
    pub scope: SearchScope,
    /// Adapters of the layers that were not selected.
    pub sharing: Sharing,
    /// Fraction of the examples that the logits learn from in the search, and the factors do not.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub val_fraction: f64,
    /// Keeps the searched factors of the selected layers instead of fresh ones.
    pub warm_start: bool,
}

impl Default for DiffoRa {
    fn default() -> Self {
        Self {
            rho: 0.5,
            relaxation: SearchRelaxation::Sigmoid,
            order: SearchOrder::First,
            xi: None,
            lr_theta: 3e-3,
            wd_theta: 1e-3,
            search_steps: None,
            scope: SearchScope::Row,
            sharing: Sharing::Pair,
            val_fraction: 0.5,
            warm_start: false,
        }
    }
}

impl DiffoRa {
    /// Steps of the search in a run of `total` steps.
    pub fn steps_of_search(&self, total: u64) -> u64 {
        self.search_steps.unwrap_or((total / 7).max(1))
    }
}
