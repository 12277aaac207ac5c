//! Sums of adapters whose rows come from one orthogonal basis ("Orthogonal Adaptation for Modular Customization of Diffusion Models", arXiv
//! 2312.02432).

use lowrank_optim::registry::{Entry, Kind, OptionError, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::algebra::stacked;
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::{Layer, Matrix, Source};
use crate::structures::{Basis, BasisKind};

/// `sum_i lambda_i s_i B_i A_i` of adapters of structure `orthogonal`, or of plain LoRA whose rows of A are vectors of the basis; others are rejected. An
/// adapter's weight is its lambda.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct OrthogonalSum {
    /// Strength of each adapter without a weight of its own.
    pub lambda: f64,
    /// Basis of adapters that do not name one.
    pub basis: BasisKind,
    /// Seed of the basis of adapters that do not name one.
    pub basis_seed: u64,
}

impl Default for OrthogonalSum {
    fn default() -> Self {
        Self { lambda: 0.6, basis: BasisKind::Auto, basis_seed: 0 }
    }
}

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[Paper {
            title: "Orthogonal Adaptation for Modular Customization of Diffusion Models",
            place: "2312.02432",
        }],
        memory: "sum of the ranks (d_in + d_out)",
        options: || OptionList::of(&OrthogonalSum::default()),
        ..Entry::plain(
            Kind::Composition,
            "orthogonal-sum",
            "sum of adapters that share an orthogonal basis, with their cross-talk",
        )
    },
    makes_pool: false,
    read: |options| read::<OrthogonalSum>(&ENTRY, options),
};

/// Overlap of the sources of a layer, each with each.
#[derive(Clone, Debug)]
pub struct Crosstalk {
    /// `|A_i A_j^T|^2 / r`: the share of common vectors if the rows are orthonormal.
    pub overlap: Matrix,
    /// `|D_i D_j^T| / (|D_i| |D_j|)`; 0 where an update is zero.
    pub crosstalk: Matrix,
}

/// Overlap of the sources of a layer.
pub fn crosstalk(layer: &Layer) -> Crosstalk {
    let count = layer.sources.len();
    let norms: Vec<f64> = layer.sources.iter().map(Source::norm).collect();
    let (mut overlap, mut crosstalk) = (Matrix::zeros(count, count), Matrix::zeros(count, count));
    for (i, x) in layer.sources.iter().enumerate() {
        for (j, y) in layer.sources.iter().enumerate() {
            let inputs = &x.a * y.a.transpose();
            overlap[(i, j)] = inputs.norm_squared() / x.rank().min(y.rank()).max(1) as f64;
            if norms[i] * norms[j] > 0.0 {
                // The columns of both B reduce to their triangles.
                let [left, right] = [&x.b, &y.b].map(|b| b.clone().qr().r());
                crosstalk[(i, j)] =
                    (left * inputs * right.transpose()).norm() * (x.scale * y.scale).abs() / (norms[i] * norms[j]);
            }
        }
    }
    Crosstalk { overlap, crosstalk }
}

impl OrthogonalSum {
    /// Sum of the updates of a layer, without the check of their basis.
    pub fn sum(&self, layer: &Layer) -> Composed {
        let parts = layer.sources.iter();
        let parts: Vec<_> =
            parts.map(|source| (&source.a, &source.b, source.weight.unwrap_or(self.lambda) * source.scale)).collect();
        let (a, b) = stacked(&parts);
        let Crosstalk { overlap, crosstalk } = crosstalk(layer);
        let largest = |matrix: &Matrix| {
            let pairs = (0..matrix.nrows()).flat_map(|i| (0..i).map(move |j| (i, j)));
            pairs.map(|pair| matrix[pair]).fold(0.0, f64::max)
        };
        Composed::factors(a, b).with("overlap", json!(largest(&overlap))).with("crosstalk", json!(largest(&crosstalk)))
    }

    /// Name of the basis of a source: the one it states, or the one of the options if its rows are vectors of it.
    fn basis_of(&self, layer: &Layer, source: &Source) -> Result<String, ComposeError> {
        if let Some(basis) = &source.basis {
            return Ok(basis.clone());
        }
        let [d_in, _] = layer.shape();
        let kind = self.basis.of(d_in);
        let basis = Basis::seeded(kind, self.basis_seed, d_in);
        for (number, row) in source.a.row_iter().enumerate() {
            let row: Vec<f64> = row.iter().copied().collect();
            if basis.find(&row).is_none() {
                return Err(layer.refused_source(
                    source,
                    format!(
                        "row {number} of A is no vector of the basis {}; only adapters trained with structure orthogonal (or from `lowrank adapter-start`) \
                         are summed this way: set basis and basis_seed, or use cat or svd",
                        kind.named(self.basis_seed)
                    ),
                ));
            }
        }
        Ok(kind.named(self.basis_seed))
    }
}

impl Composition for OrthogonalSum {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        if self.basis == BasisKind::Gaussian {
            return Err(OptionError::value("basis", "gaussian", "has no shared vectors; set qr or dct").into());
        }
        if !self.lambda.is_finite() {
            return Err(OptionError::value("lambda", self.lambda, "must be finite").into());
        }
        let first = self.basis_of(layer, &layer.sources[0])?;
        for source in &layer.sources[1..] {
            let own = self.basis_of(layer, source)?;
            if own != first {
                return Err(layer.refused_source(
                    source,
                    format!(
                        "has the basis {own}, {} has {first}; adapters with one basis can be summed without cross-talk: train them with the same basis and basis_seed",
                        layer.sources[0].adapter
                    ),
                ));
            }
        }
        Ok(self.sum(layer))
    }
}
