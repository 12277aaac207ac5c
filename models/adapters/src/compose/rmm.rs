//! RMM: reversible merging into a small basis at each position ("Towards Reversible Model Merging For Low-rank Weights", arXiv 2510.14163).
//! Written from the abstract and reviews; no code of the authors was found.

use lowrank_optim::registry::{Entry, Kind, OptionError, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::algebra::Svd;
use super::definition::{Composed, Composite, Composition, CompositionEntry, Figures, LayerSize, read};
use super::error::ComposeError;
use super::pool::{PoolLayer, Side, share};
use super::source::{Layer, Matrix, Source};

/// At every row of B and every column of A, the mean of the sources, p directions that they have in common, and p coefficients for each source. Any
/// source is rebuilt from them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Rmm {
    /// Directions at each position: 0 keeps the mean alone, min(r, n - 1) everything.
    #[schemars(extend("x-unset" = "2, or what budget or residual ask for"))]
    pub p: Option<usize>,
    /// Largest size of the pool in bytes, by which p is chosen.
    #[schemars(extend("x-unset" = "no limit"))]
    pub budget: Option<u64>,
    /// Largest share of the squared deviations from the mean that is left out; p is chosen by layer.
    #[schemars(range(min = 0.0, max = 1.0), extend("x-unset" = "not used"))]
    pub residual: Option<f64>,
    /// Subtracts the mean.
    pub center: bool,
    /// Lowers a p that is too large, instead of rejecting it.
    pub clamp: bool,
    /// Pads sources of smaller rank with zeros to the largest.
    pub pad: bool,
    /// Rotates the factors of each source onto those of the first, before they are merged; the updates do not change.
    pub align: bool,
}

impl Default for Rmm {
    fn default() -> Self {
        Self { p: None, budget: None, residual: None, center: true, clamp: false, pad: false, align: false }
    }
}

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[Paper { title: "Towards Reversible Model Merging For Low-rank Weights", place: "2510.14163" }],
        memory: "(d_in + d_out) (p (r + n) + r) + n for n sources",
        options: || OptionList::of(&Rmm::default()),
        ..Entry::plain(
            Kind::Composition,
            "rmm",
            "a pool that gives each source back: a mean and p directions at each position",
        )
    },
    makes_pool: true,
    read: |options| read::<Rmm>(&ENTRY, options),
};

/// Values of a layer `[d_in, d_out]` in a pool of n sources of rank r, and those of the sources.
fn stored([d_in, d_out]: [usize; 2], rank: usize, count: usize, p: usize) -> [u64; 2] {
    let sides = (d_in + d_out) as u64;
    let (rank, count, p) = (rank as u64, count as u64, p as u64);
    [sides * (p * (rank + count) + rank) + count, sides * rank * count]
}

impl Rmm {
    fn validate(&self) -> Result<(), ComposeError> {
        let given = [self.p.is_some(), self.budget.is_some(), self.residual.is_some()];
        if given.into_iter().filter(|given| *given).count() > 1 {
            return Err(ComposeError::Sources(
                "p, budget and residual each choose the size of the pool; give one".into(),
            ));
        }
        Ok(())
    }

    /// Sources whose factors have the rank of the layer, aligned if asked for.
    fn prepared(&self, layer: &Layer) -> Result<Vec<Source>, ComposeError> {
        let mut sources = layer.sources.clone();
        if self.pad {
            let most = layer.largest_rank();
            for source in &mut sources {
                source.a = source.a.clone().resize_vertically(most, 0.0);
                source.b = source.b.clone().resize_horizontally(most, 0.0);
            }
        } else {
            layer.common_rank("a pool needs one rank: set pad=true to fill up with zeros")?;
        }
        if self.align {
            align(&mut sources);
        }
        Ok(sources)
    }

    /// The pool of one layer with all directions, and `p` of them to keep.
    pub fn pooled(&self, layer: &Layer) -> Result<(PoolLayer, usize), ComposeError> {
        self.validate()?;
        let names: Vec<String> = layer.sources.iter().map(|source| source.adapter.clone()).collect();
        self.check(&names)?;
        if let Some(source) = layer.sources.iter().find(|source| source.weight.is_some()) {
            return Err(
                layer.refused_source(source, "has a weight; a pool gives each adapter back as it was: remove it")
            );
        }
        let sources = self.prepared(layer)?;
        let (count, rank) = (sources.len(), sources[0].rank());
        let most = rank.min(if self.center { count - 1 } else { count });
        let rows: Vec<Matrix> = sources.iter().map(|source| source.b.transpose()).collect();
        let columns: Vec<Matrix> = sources.iter().map(|source| source.a.clone()).collect();
        let scales = sources.iter().map(|source| source.scale).collect();
        let pool = PoolLayer { b: Side::of(&rows, self.center), a: Side::of(&columns, self.center), scales };
        let p = match (self.p, self.residual) {
            (_, Some(largest)) => {
                let lost = |p: usize| pool.a.residuals(p).iter().sum::<f64>() + pool.b.residuals(p).iter().sum::<f64>();
                let all = lost(0);
                (0..most).find(|p| lost(*p) <= largest * all).unwrap_or(most)
            }
            (Some(p), None) if p > most && !self.clamp => {
                let reason = format!(
                    "layer {}: {count} sources of rank {rank} have at most {most} directions; lower it, or set clamp=true",
                    layer.path
                );
                return Err(OptionError::value("p", p, reason).into());
            }
            (given, None) => given.unwrap_or(2).min(most),
        };
        Ok((pool, p))
    }
}

impl Composition for Rmm {
    fn check(&self, sources: &[String]) -> Result<(), ComposeError> {
        match sources.len() {
            0 | 1 => Err(ComposeError::Sources(format!(
                "a pool needs at least two adapters, {} is given; name more with --adapter",
                if sources.is_empty() { "none".into() } else { sources.join(", ") }
            ))),
            _ => Ok(()),
        }
    }

    fn plan(&mut self, layers: &[LayerSize]) -> Result<(), ComposeError> {
        self.validate()?;
        let Some(budget) = self.budget.take() else { return Ok(()) };
        let bytes = |p: usize| -> u64 {
            let of = |layer: &LayerSize| {
                let rank = layer.ranks.iter().copied().max().unwrap_or(0);
                let count = layer.ranks.len();
                let p = p.min(rank.min(if self.center { count.saturating_sub(1) } else { count }));
                4 * stored(layer.shape, rank, count, p)[0]
            };
            layers.iter().map(of).sum()
        };
        let most =
            layers.iter().map(|layer| layer.ranks.len().min(layer.ranks.iter().copied().max().unwrap_or(0))).max();
        let Some(p) = (0..=most.unwrap_or(0)).rev().find(|p| bytes(*p) <= budget) else {
            let reason = format!("the means alone take {} bytes; give at least that", bytes(0));
            return Err(OptionError::value("budget", budget, reason).into());
        };
        (self.p, self.clamp) = (Some(p), true);
        Ok(())
    }

    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let (mut pool, p) = self.pooled(layer)?;
        let sum = |side: &Side, p: usize| side.residuals(p).iter().sum::<f64>();
        let (lost, all) = (sum(&pool.a, p) + sum(&pool.b, p), sum(&pool.a, 0) + sum(&pool.b, 0));
        pool.a.truncate(p);
        pool.b.truncate(p);
        let [ours, theirs] = stored(layer.shape(), pool.a.mean.nrows(), pool.sources(), p);
        let mut report = Figures::new();
        report.insert("p".into(), p.into());
        report.insert("residual".into(), share(lost, all).into());
        report.insert("storage_ratio".into(), (ours as f64 / theirs.max(1) as f64).into());
        Ok(Composed { result: Composite::Pool(Box::new(pool)), report })
    }
}

/// Replaces the factors of each source by balanced ones, rotated onto those of the first source; updates do not change.
fn align(sources: &mut [Source]) {
    for source in sources.iter_mut() {
        let rank = source.rank();
        let svd = Svd::of_product(&source.b, &source.a);
        let kept = rank.min(svd.values.len());
        let (mut a, mut b) = (Matrix::zeros(rank, source.a.ncols()), Matrix::zeros(source.b.nrows(), rank));
        for k in 0..kept {
            let direction = svd.v.column(k);
            let sign = if direction[direction.icamax()] < 0.0 { -1.0 } else { 1.0 };
            let root = svd.values[k].sqrt() * sign;
            a.set_row(k, &(direction.transpose() * root));
            b.set_column(k, &(svd.u.column(k) * root));
        }
        (source.a, source.b) = (a, b);
    }
    let Some((first, others)) = sources.split_first_mut() else { return };
    for source in others {
        // The rotation Q that brings `[B Q; (Q^T A)^T]` closest to the first: the polar factor of the cross product.
        let cross = source.b.transpose() * &first.b + &source.a * first.a.transpose();
        let Svd { u, v, .. } = Svd::of(&complete(cross));
        let rotation = u * v.transpose();
        source.b = &source.b * &rotation;
        source.a = rotation.transpose() * &source.a;
    }
}

/// A nearby matrix of full rank, so that its polar factor is a rotation.
fn complete(mut cross: Matrix) -> Matrix {
    let least = 1e-9 * cross.norm().max(f64::MIN_POSITIVE);
    for k in 0..cross.nrows() {
        cross[(k, k)] += least;
    }
    cross
}
