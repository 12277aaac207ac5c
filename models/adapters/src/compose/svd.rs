//! Weighted sum of the updates, truncated to a rank by a singular value decomposition (named as in Hugging Face's `peft`).

use lowrank_optim::registry::{Entry, Kind, OptionList};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::algebra::{Svd, stacked};
use super::cat::TASK_ARITHMETIC;
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::{Layer, Matrix};

/// The best approximation of rank `rank` to `sum_i w_i s_i B_i A_i`, from the triangles of the stacked factors: no dense matrix is formed. The scale
/// of an adapter counts once (Hugging Face's `peft` multiplies by it twice).
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SvdSum {
    /// Rank of the result.
    #[schemars(range(min = 1), extend("x-unset" = "largest rank of the sources"))]
    pub rank: Option<usize>,
    /// Quantile of the magnitudes of both factors at which they are clipped.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-unset" = "no clipping"))]
    pub clamp: Option<f64>,
}

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[TASK_ARITHMETIC],
        memory: "rank (d_in + d_out)",
        options: || OptionList::of(&SvdSum::default()),
        ..Entry::plain(Kind::Composition, "svd", "weighted sum of the updates, truncated to a rank")
    },
    makes_pool: false,
    read: |options| read::<SvdSum>(&ENTRY, options),
};

impl Composition for SvdSum {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let rank = rank(layer, self.rank)?;
        let parts: Vec<_> =
            layer.sources.iter().map(|source| (&source.a, &source.b, source.weighted_scale())).collect();
        let (a, b) = stacked(&parts);
        let svd = Svd::of_product(&b, &a);
        let (mut a, mut b, residual) = svd.leading(rank);
        if let Some(quantile) = self.clamp {
            clip(&mut a, &mut b, quantile);
        }
        Ok(Composed::factors(a, b).with("residual", residual))
    }
}

/// The rank of the result: the given one, or the largest of the sources. Rejects one above the smaller side.
pub(super) fn rank(layer: &Layer, given: Option<usize>) -> Result<usize, ComposeError> {
    let [d_in, d_out] = layer.shape();
    let most = d_in.min(d_out);
    match given {
        Some(rank) if rank > most => Err(layer
            .refused(format!("rank = {rank}: the layer has {d_in} inputs and {d_out} outputs; give at most {most}"))),
        Some(rank) => Ok(rank),
        None => Ok(layer.largest_rank().min(most)),
    }
}

/// Clips the entries of both factors at a quantile of their magnitudes (linear between order statistics).
fn clip(a: &mut Matrix, b: &mut Matrix, quantile: f64) {
    let mut all: Vec<f64> = a.iter().chain(b.iter()).copied().collect();
    if all.is_empty() {
        return;
    }
    all.sort_by(f64::total_cmp);
    let place = quantile * (all.len() - 1) as f64;
    let (low, high) = (all[place.floor() as usize], all[place.ceil() as usize]);
    let most = (low + (high - low) * place.fract()).abs();
    for value in a.iter_mut().chain(b.iter_mut()) {
        *value = value.clamp(-most, most);
    }
}
