//! DARE: drop entries at random and rescale the others ("Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
//! arXiv 2311.03099).

use lowrank_kernels::random::{generator, key_of};
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::average::Space;
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::Layer;
use super::sparse::{Convention, Election, Rows, Rule, dense_matrices, merged, per_tensor};

/// Keeps each entry of each source with a probability, rescales what is kept, and merges: a weighted sum, or an election of signs.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Dare {
    /// Merging of what is kept.
    pub merge: DareMerge,
    /// Tensors that are dropped from: the factors, as `dare_linear` of Hugging Face's `peft`, or the updates, as `dare_linear_svd`.
    pub space: Space,
    /// Probability of keeping an entry.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-required" = true))]
    pub density: f64,
    /// Scale of the entries that are kept.
    pub rescale: Rescale,
    /// Quantity whose sign wins, for `merge = ties`.
    pub election: Election,
    /// Seed of the masks.
    pub seed: u64,
    /// Rank of the result for updates.
    #[schemars(range(min = 1), extend("x-unset" = "largest rank of the sources"))]
    pub rank: Option<usize>,
}

/// Merging of sparse sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DareMerge {
    /// Weighted sum.
    #[default]
    Linear,
    /// Election of signs as in TIES, without trimming.
    Ties,
}

/// Scale of the entries that are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Rescale {
    /// 1 / density, which keeps the mean.
    #[default]
    Density,
    /// The factor that restores the sum of magnitudes (`mergekit`).
    L1,
}

impl Default for Dare {
    fn default() -> Self {
        Self {
            merge: DareMerge::Linear,
            space: Space::Factors,
            density: 1.0,
            rescale: Rescale::Density,
            election: Election::Total,
            seed: 0,
            rank: None,
        }
    }
}

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[Paper {
            title: "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
            place: "2311.03099",
        }],
        memory: "rank (d_in + d_out)",
        options: || OptionList::of(&Dare::default()),
        ..Entry::plain(
            Kind::Composition,
            "dare",
            "random entries of each source, rescaled; summed, or with elected signs",
        )
    },
    makes_pool: false,
    read: |options| read::<Dare>(&ENTRY, options),
};

impl Dare {
    /// Composes with masks that are drawn from the seed or given: one for each source and tensor (0 for A and the update, 1 for B), true for an
    /// entry that is kept, in row-major order. A mask is asked for each time that the tensor is read.
    pub fn masked<M: Iterator<Item = bool>>(
        &self,
        layer: &Layer,
        mask: impl Fn(usize, usize) -> M,
    ) -> Result<Composed, ComposeError> {
        let mut composed = per_tensor(layer, self.space, self.rank, |tensors, weights, tensor| {
            let masks = || (0..tensors.len()).map(|source| mask(source, tensor));
            let factors: Vec<f64> =
                tensors.iter().zip(masks()).map(|(tensor, mask)| self.factor(tensor, mask)).collect();
            let mut masks: Vec<M> = masks().collect();
            let rule = match self.merge {
                DareMerge::Linear => Rule::Sum,
                DareMerge::Ties => Rule::Elect(self.election, Convention::Count),
            };
            Ok(merged(tensors, weights, rule, |source, values| {
                for (value, kept) in values.iter_mut().zip(&mut masks[source]) {
                    *value = if kept { *value * factors[source] } else { 0.0 };
                }
            }))
        })?;
        if self.merge == DareMerge::Linear {
            composed.report.clear();
        }
        Ok(composed)
    }

    /// Scale of what is kept of a tensor.
    fn factor(&self, tensor: &Rows, mut mask: impl Iterator<Item = bool>) -> f64 {
        if self.rescale == Rescale::Density {
            return self.density.recip();
        }
        let (mut before, mut after) = (0.0, 0.0);
        tensor.each(|values| {
            for (value, kept) in values.iter().zip(&mut mask) {
                before += value.abs();
                after += if kept { value.abs() } else { 0.0 };
            }
        });
        // Nothing is left to rescale where all is dropped.
        if after == 0.0 { 1.0 } else { before / after }
    }
}

impl Composition for Dare {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let key = key_of(&layer.path);
        self.masked(layer, |source, tensor| {
            let mut random = generator(self.seed, key, (2 * source + tensor) as u64);
            std::iter::repeat_with(move || random.random::<f64>() < self.density)
        })
    }

    fn dense_matrices(&self, _sources: usize) -> usize {
        dense_matrices(self.space)
    }
}
