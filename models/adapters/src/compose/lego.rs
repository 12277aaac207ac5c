//! LoRA-LEGO: clusters of rank-one units ("Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise
//! Clustering", arXiv 2409.16167). Written from the paper's summary and reviews; no code of the authors was found.

use lowrank_kernels::random::key_of;
use lowrank_optim::registry::{Entry, Kind, OptionError, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::kmeans::{Clusters, from_columns, seeded};
use super::linear::root;
use super::source::{Layer, Matrix};

/// Clusters all rank-one units of all adapters, a row of A with its column of B, and keeps one unit for each cluster: its mean, with the mean
/// length of its members. With one adapter and a smaller k it prunes.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lego {
    /// Rank of the result, at most the sum of the ranks.
    #[schemars(range(min = 1), extend("x-unset" = "mean rank of the sources"))]
    pub k: Option<usize>,
    /// Seed of the starts.
    pub seed: u64,
    /// Number of starts, of which the one of lowest inertia is kept.
    #[schemars(range(min = 1))]
    pub n_init: usize,
    /// Iterations of one start at most.
    #[schemars(range(min = 1))]
    pub max_iter: usize,
    /// Gives each mean the mean length of its members.
    pub parameter_reweight: bool,
    /// Multiplies the result by sqrt(r / k), r the mean rank of the sources.
    pub output_reweight: bool,
    /// Rescales each unit so that its halves have equal length, before clustering.
    pub balance_units: bool,
    /// Flips the signs of units so that the entry of largest magnitude of the row of A is positive, before clustering.
    pub align_signs: bool,
}

impl Default for Lego {
    fn default() -> Self {
        Self {
            k: None,
            seed: 0,
            n_init: 10,
            max_iter: 300,
            parameter_reweight: true,
            output_reweight: true,
            balance_units: false,
            align_signs: false,
        }
    }
}

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[Paper {
            title: "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise Clustering",
            place: "2409.16167",
        }],
        memory: "k (d_in + d_out)",
        options: || OptionList::of(&Lego::default()),
        ..Entry::plain(Kind::Composition, "lego", "LoRA-LEGO: clusters of rank-one units; with one adapter it prunes")
    },
    makes_pool: false,
    read: |options| read::<Lego>(&ENTRY, options),
};

/// Means shorter than this are units that cancel.
const CANCELLED: f64 = 1e-12;

/// A clustering of the units of one layer and what was made of it.
#[derive(Clone, Debug)]
pub struct Clustered {
    /// The units `[d_in + d_out, P]`: rows of A above columns of B.
    pub pool: Matrix,
    /// Clusters of the units.
    pub clusters: Clusters,
    /// Mean length of the members of each cluster.
    pub lengths: Vec<f64>,
    /// Factor of each mean.
    pub ratios: Vec<f64>,
    /// Merged `A [k, d_in]`, without the output factor.
    pub a: Matrix,
    /// Merged `B [d_out, k]`, without the output factor.
    pub b: Matrix,
    /// Output factor.
    pub scale: f64,
}

impl Lego {
    /// Clusters a layer, from these units as first means if they are given.
    pub fn clustered(&self, layer: &Layer, start: Option<&[usize]>) -> Result<Clustered, ComposeError> {
        let pool = self.pool(layer);
        let mean_rank = layer.total_rank() as f64 / layer.sources.len() as f64;
        let units = pool.ncols();
        if units == 0 {
            let pool = Matrix::zeros(0, 0);
            return Ok(Clustered {
                clusters: from_columns(&pool, &[], 0),
                pool,
                lengths: Vec::new(),
                ratios: Vec::new(),
                a: Matrix::zeros(0, layer.shape()[0]),
                b: Matrix::zeros(layer.shape()[1], 0),
                scale: 1.0,
            });
        }
        let k = self.k.unwrap_or((mean_rank.round() as usize).max(1));
        if k > units {
            let reason = format!("layer {} has {units} units (the sum of the ranks); give at most that", layer.path);
            return Err(OptionError::value("k", k, reason).into());
        }
        let clusters = match start {
            Some(start) => from_columns(&pool, start, self.max_iter),
            None => seeded(&pool, k, [self.seed, key_of(&layer.path)], self.n_init, self.max_iter),
        };
        let mut lengths = vec![0.0; k];
        let mut sizes = vec![0usize; k];
        for (unit, cluster) in pool.column_iter().zip(&clusters.assignment) {
            lengths[*cluster] += unit.norm();
            sizes[*cluster] += 1;
        }
        lengths.iter_mut().zip(&sizes).for_each(|(length, size)| *length /= (*size).max(1) as f64);
        let norms: Vec<f64> = clusters.centroids.column_iter().map(|mean| mean.norm()).collect();
        let ratios = lengths.iter().zip(&norms);
        let ratios = ratios.map(|(length, norm)| if *norm < CANCELLED { 1.0 } else { length / norm });
        let ratios: Vec<f64> = ratios.collect();
        let mut merged = clusters.centroids.clone();
        if self.parameter_reweight {
            merged.column_iter_mut().zip(&ratios).for_each(|(mut mean, ratio)| mean *= *ratio);
        }
        let [d_in, d_out] = layer.shape();
        let (a, b) = (merged.rows(0, d_in).transpose(), merged.rows(d_in, d_out).into_owned());
        let scale = if self.output_reweight { (mean_rank / k as f64).sqrt() } else { 1.0 };
        Ok(Clustered { pool, clusters, lengths, ratios, a, b, scale })
    }

    fn pool(&self, layer: &Layer) -> Matrix {
        let [d_in, d_out] = layer.shape();
        let mut pool = Matrix::zeros(d_in + d_out, layer.total_rank());
        let mut at = 0;
        for source in &layer.sources {
            let [of_b, of_a] = root(source.weighted_scale());
            for rank in 0..source.rank() {
                let mut unit = pool.column_mut(at);
                unit.rows_mut(0, d_in).copy_from(&(source.a.row(rank).transpose() * of_a));
                unit.rows_mut(d_in, d_out).copy_from(&(source.b.column(rank) * of_b));
                at += 1;
                if self.balance_units {
                    let norms = [unit.rows(0, d_in).norm(), unit.rows(d_in, d_out).norm()];
                    if norms[0] > 0.0 && norms[1] > 0.0 {
                        let factor = (norms[1] / norms[0]).sqrt();
                        unit.rows_mut(0, d_in).scale_mut(factor);
                        unit.rows_mut(d_in, d_out).scale_mut(factor.recip());
                    }
                }
                if self.align_signs && d_in > 0 && unit[unit.rows(0, d_in).icamax()] < 0.0 {
                    unit.neg_mut();
                }
            }
        }
        pool
    }
}

impl Composition for Lego {
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let Clustered { clusters, ratios, a, b, scale, .. } = self.clustered(layer, None)?;
        let mut sizes = vec![0usize; a.nrows()];
        clusters.assignment.iter().for_each(|cluster| sizes[*cluster] += 1);
        let cancelled = clusters.centroids.column_iter().filter(|mean| mean.norm() < CANCELLED).count();
        let mut sorted = sizes.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Composed::factors(a * scale.sqrt(), b * scale.sqrt())
            .with("cluster_sizes", json!(sorted))
            .with("inertia", clusters.inertia)
            .with("largest_ratio", ratios.iter().copied().fold(0.0, f64::max))
            .with("cancelled_units", cancelled)
            .with("output_scale", scale))
    }
}
