//! TIES: trim, elect sign, merge ("TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708).

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::average::Space;
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::Layer;
use super::sparse::{Convention, Election, Rule, dense_matrices, merged_largest, per_tensor};

/// Keeps the largest entries of each source, elects a sign for each entry and averages the values that have it.
///
/// On factors this depends on their gauge: factors of independently trained adapters have little in common entry by entry.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Ties {
    /// Tensors that are merged: the factors, as `ties` of Hugging Face's `peft`, or the updates, as `ties_svd`.
    pub space: Space,
    /// Share of the entries of each source that is kept; 1 keeps all.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-required" = true))]
    pub density: f64,
    /// Quantity whose sign wins.
    pub election: Election,
    /// Divisor of the kept values.
    pub convention: Convention,
    /// Factor of the merged tensor.
    pub lambda: f64,
    /// Rank of the result for updates.
    #[schemars(range(min = 1), extend("x-unset" = "largest rank of the sources"))]
    pub rank: Option<usize>,
}

impl Default for Ties {
    fn default() -> Self {
        Self {
            space: Space::Factors,
            density: 1.0,
            election: Election::Total,
            convention: Convention::Count,
            lambda: 1.0,
            rank: None,
        }
    }
}

pub(super) const PAPER: Paper =
    Paper { title: "TIES-Merging: Resolving Interference When Merging Models", place: "2306.01708" };

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[PAPER],
        memory: "rank (d_in + d_out)",
        options: || OptionList::of(&Ties::default()),
        ..Entry::plain(Kind::Composition, "ties", "largest entries of each source whose sign is the elected one")
    },
    makes_pool: false,
    read: |options| read::<Ties>(&ENTRY, options),
};

impl Composition for Ties {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        per_tensor(layer, self.space, self.rank, |tensors, weights, _| {
            let rule = Rule::Elect(self.election, self.convention);
            let mut found = merged_largest(tensors, weights, self.density, rule)?;
            found.merged *= self.lambda;
            Ok(found)
        })
    }

    fn dense_matrices(&self, _sources: usize) -> usize {
        dense_matrices(self.space)
    }
}
