//! Weighted sum of the largest entries of each source (named as in Hugging Face's `peft`).

use lowrank_optim::registry::{Entry, Kind, OptionList};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::average::Space;
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::Layer;
use super::sparse::{Rule, dense_matrices, merged_largest, per_tensor};
use super::ties::PAPER;

/// Keeps the largest entries of each source and sums them with their weights.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MagnitudePrune {
    /// Tensors that are pruned: the factors, as `magnitude_prune` of Hugging Face's `peft`, or the updates, as `magnitude_prune_svd`.
    pub space: Space,
    /// Share of the entries of each source that is kept; 1 keeps all.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-required" = true))]
    pub density: f64,
    /// Rank of the result for updates.
    #[schemars(range(min = 1), extend("x-unset" = "largest rank of the sources"))]
    pub rank: Option<usize>,
}

impl Default for MagnitudePrune {
    fn default() -> Self {
        Self { space: Space::Factors, density: 1.0, rank: None }
    }
}

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[PAPER],
        memory: "rank (d_in + d_out)",
        options: || OptionList::of(&MagnitudePrune::default()),
        ..Entry::plain(Kind::Composition, "magnitude-prune", "weighted sum of the largest entries of each source")
    },
    makes_pool: false,
    read: |options| read::<MagnitudePrune>(&ENTRY, options),
};

impl Composition for MagnitudePrune {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let mut composed = per_tensor(layer, self.space, self.rank, |tensors, weights, _| {
            merged_largest(tensors, weights, self.density, Rule::Sum)
        })?;
        // No sign is elected.
        composed.report.clear();
        Ok(composed)
    }

    fn dense_matrices(&self, _sources: usize) -> usize {
        dense_matrices(self.space)
    }
}
