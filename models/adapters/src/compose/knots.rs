//! KnOTS: merging in a basis that the sources share ("Model merging with SVD to tie the Knots", arXiv 2410.19735).

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::algebra::{Svd, stacked};
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::{Layer, Matrix};
use super::sparse::{sign, trimmed};

/// With `[D_1 ... D_N] = U S [V_1 ... V_N]`, merges the `S V_i`, which share the basis U, and multiplies by U. From the triangles of the factors: no
/// update is formed.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Knots {
    /// Merging of the parts in the shared basis.
    pub merge: KnotsMerge,
    /// Share of the entries of each part that is kept; 1 keeps all.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub density: f64,
    /// Factor of the merged update, for `merge = ties`.
    pub scale: f64,
}

/// Merging of parts in a shared basis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KnotsMerge {
    /// Trims, elects signs and averages the values that have them.
    #[default]
    Ties,
    /// Plain mean, which is the mean of the updates.
    Average,
}

impl Default for Knots {
    fn default() -> Self {
        Self { merge: KnotsMerge::Ties, density: 1.0, scale: 0.5 }
    }
}

/// Singular values up to this are dropped.
const LEAST: f64 = 1e-5;

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[Paper { title: "Model merging with SVD to tie the Knots", place: "2410.19735" }],
        memory: "sum of the ranks (d_in + d_out)",
        options: || OptionList::of(&Knots::default()),
        ..Entry::plain(Kind::Composition, "knots", "TIES in a basis that the sources share")
    },
    makes_pool: false,
    read: |options| read::<Knots>(&ENTRY, options),
};

/// The shared basis `[d_out, k]` and the parts `S V_i [k, d_in]`.
fn parts(layer: &Layer) -> (Matrix, Vec<Matrix>) {
    let pairs: Vec<_> = layer.sources.iter().map(|source| (&source.a, &source.b, 1.0)).collect();
    let (_, all) = stacked(&pairs);
    let outputs = all.qr();
    let (basis, triangle) = (outputs.q(), outputs.r());
    let inputs: Vec<_> = layer.sources.iter().map(|source| source.a.transpose().qr()).collect();
    // `[R_1 s_1 R_A1^T ... R_N s_N R_AN^T]`, times the orthonormal rows of the inputs.
    let widths: Vec<usize> = inputs.iter().map(|input| input.r().nrows()).collect();
    let mut core = Matrix::zeros(triangle.nrows(), widths.iter().sum());
    let (mut rank, mut column) = (0, 0);
    for ((source, input), width) in layer.sources.iter().zip(&inputs).zip(&widths) {
        let part = triangle.columns(rank, source.rank()) * input.r().transpose() * source.weighted_scale();
        core.columns_mut(column, *width).copy_from(&part);
        (rank, column) = (rank + source.rank(), column + width);
    }
    let svd = Svd::of(&core);
    let kept = svd.values.iter().take_while(|value| **value > LEAST).count();
    let mut column = 0;
    let parts = inputs.iter().zip(&widths).map(|(input, width)| {
        let mut part = svd.v.view((column, 0), (*width, kept)).transpose();
        column += width;
        part.row_iter_mut().zip(&svd.values).for_each(|(mut row, value)| row *= *value);
        part * input.q().transpose()
    });
    let parts = parts.collect();
    (basis * svd.u.columns(0, kept), parts)
}

impl Composition for Knots {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let (basis, parts) = parts(layer);
        if basis.ncols() == 0 {
            let [d_in, _] = layer.shape();
            return Ok(Composed::factors(Matrix::zeros(0, d_in), basis));
        }
        let (count, [kept, d_in]) = (parts.len(), [basis.ncols(), layer.shape()[0]]);
        let parts: Result<Vec<Matrix>, _> = parts.into_iter().map(|part| trimmed(part, self.density)).collect();
        let parts = parts?;
        let mut merged = Matrix::zeros(kept, d_in);
        if self.merge == KnotsMerge::Average {
            parts.iter().for_each(|part| merged += part);
            return Ok(Composed::factors(merged / count as f64, basis));
        }
        let all: f64 = parts.iter().flat_map(|part| part.iter()).map(|value| sign(*value)).sum();
        let mut conflicts = 0usize;
        for place in 0..merged.len() {
            let values = || parts.iter().map(|part| part[place]);
            let sum: f64 = values().sum();
            let elected = if sum == 0.0 { sign(all) } else { sign(sum) };
            let kept: Vec<f64> = values().filter(|value| *value != 0.0 && (*value > 0.0) == (elected > 0.0)).collect();
            conflicts += usize::from(values().any(|value| value > 0.0) && values().any(|value| value < 0.0));
            merged[place] = self.scale * kept.iter().sum::<f64>() / kept.len().max(1) as f64;
        }
        let conflicts = conflicts as f64 / (kept * d_in) as f64;
        Ok(Composed::factors(merged, basis).with("sign_conflicts", conflicts))
    }
}
