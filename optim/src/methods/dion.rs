//! Orthonormal updates of low rank by power iteration on the momentum.

use burn::config::Config;
use burn::optim::RecordState;
use burn::tensor::{DType, Device, Tensor};
use lowrank_kernels::decompose::orthonormal_factor;
use lowrank_kernels::elementwise::{descend, norm};
use lowrank_kernels::ops::MatrixProduct;
use lowrank_kernels::random::normal_matrix;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adam::AdamOptions;
use crate::error::OptimError;
use crate::matrix::{MatrixRule, matrix_method};
use crate::matrix_id::MatrixId;
use crate::methods::orthogonal::{OrthogonalOptions, Scaling};
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::registry::options;

/// Normalisation of the right factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RightFactor {
    /// Each column has norm 1.
    Colnorm,
    /// Columns are orthonormal ("Orth-Dion", arXiv 2605.16341).
    Qr,
}

/// Configuration of Dion: "Dion: Distributed Orthonormalized Updates" (Ahn et al., arXiv 2504.05295).
///
/// One step of power iteration, from the right factor of the step before, gives the leading directions of the momentum; the weights move by their
/// orthonormal product, and what was used decays in the momentum. For matrices inside a model; everything else uses AdamW.
#[derive(Config, Debug, JsonSchema)]
pub struct DionConfig {
    /// Rank of the update; 0 derives it from `rank_fraction`.
    #[config(default = 0)]
    #[schemars(range(max = 1_000_000))]
    pub rank: usize,
    /// Rank as a fraction of the smaller side.
    #[config(default = 1.0)]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub rank_fraction: f64,
    /// Rounds the rank of `rank_fraction` up to a multiple of this.
    #[config(default = 1)]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rank_multiple_of: usize,
    /// Fraction of the applied component kept in the momentum (the paper's mu).
    #[config(default = 0.95)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub momentum: f64,
    /// Power iterations per step.
    #[config(default = 1)]
    #[schemars(range(min = 1, max = 1000))]
    pub power_iters: usize,
    /// Normalisation of the right factor.
    #[config(default = "RightFactor::Colnorm")]
    pub right: RightFactor,
    /// Added to the norms of columns.
    #[config(default = 1e-8)]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub norm_epsilon: f64,
    /// Seed of the first right factor.
    #[config(default = 0)]
    pub seed: u64,
    /// Options of the update and of all other parameters.
    #[config(default = "OrthogonalOptions::new().with_scaling(Scaling::Spectral).with_others_lr_scale(1.0)")]
    pub update: OrthogonalOptions,
    /// Options of AdamW for all other parameters; its weight decay applies to the matrices too.
    #[config(default = "AdamOptions::new().with_beta_2(0.95).with_weight_decay(0.01)")]
    pub adam: AdamOptions,
}

/// Dion's rule for one matrix.
#[derive(Clone, Debug)]
pub struct Dion {
    config: DionConfig,
}

/// State of Dion for one matrix.
#[derive(Clone, Debug, RecordState)]
pub struct DionState {
    /// Momentum, as large as the matrix.
    pub momentum: Tensor<2>,
    /// Right factor, `[n_min, r]`.
    pub q: Tensor<2>,
}

impl DionConfig {
    /// Rejects values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        Ok(options::validate(self)?)
    }

    /// Directions of a matrix.
    pub fn rank_of(&self, [rows, columns]: [usize; 2]) -> usize {
        let side = rows.min(columns);
        match self.rank {
            0 => {
                let share = (self.rank_fraction * side as f64).ceil() as usize;
                share.max(1).next_multiple_of(self.rank_multiple_of).min(side)
            }
            rank => rank,
        }
    }

    /// Bytes of state for a matrix of this shape.
    pub fn state_bytes(&self, shape @ [rows, columns]: [usize; 2]) -> usize {
        let (side, rank) = (rows.min(columns), self.rank_of(shape));
        if rank > side { 8 * rows * columns } else { 4 * (rows * columns + side * rank) }
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = method!(
    DionConfig,
    DionConfig::new(),
    Entry {
        papers: &[Paper { title: "Dion: Distributed Orthonormalized Updates", place: "2504.05295" }],
        memory: "RC + n_min r",
        needs: &["hidden matrices whose projected side is at least the rank"],
        lr: Some(0.02),
        ..Entry::plain(Kind::Optimizer, "dion", "orthonormal updates of low rank by power iteration on the momentum")
    }
);

matrix_method!(DionConfig, Dion);

impl MatrixRule for Dion {
    type State = DionState;

    fn takes(&self, shape @ [rows, columns]: [usize; 2]) -> bool {
        self.config.rank_of(shape) <= rows.min(columns)
    }

    fn fresh(&self, shape: [usize; 2], place: MatrixId, device: &Device) -> DionState {
        let side = shape[0].min(shape[1]);
        let q = normal_matrix(self.config.seed, place.key, [side, self.config.rank_of(shape)], device);
        DionState { momentum: Tensor::zeros(shape, (device, DType::F32)), q }
    }

    fn step(&self, lr: f64, w: Tensor<2>, g: Tensor<2>, state: DionState) -> (Tensor<2>, DionState) {
        let c = &self.config;
        let (shape, keep) = (w.dims(), 1.0 - lr * c.adam.weight_decay);
        let turned = shape[0] < shape[1];
        let turn = |x: Tensor<2>| if turned { x.transpose() } else { x };
        let b = turn(state.momentum + g);
        if norm(&b) == 0.0 {
            return (w.mul_scalar(keep), DionState { momentum: turn(b), q: state.q });
        }
        let (mut p, mut r) = (b.clone(), state.q);
        for _ in 0..c.power_iters {
            p = orthonormal_factor(&b.clone().times(r));
            r = b.clone().transpose().times(p.clone());
        }
        let momentum = descend(b, 1.0, 1.0 - c.momentum, p.clone().times(r.clone().transpose()));
        let q = match c.right {
            RightFactor::Colnorm => {
                let norms = r.clone().square().sum_dim(0).sqrt().add_scalar(c.norm_epsilon);
                r / norms
            }
            // The difference is 0, or NaN where a value is not finite: unit vectors would hide that.
            RightFactor::Qr => orthonormal_factor(&r) + (r.clone() - r.clone()),
        };
        let rate = lr * c.update.factor(shape);
        let update = turn(p.times(q.clone().transpose()));
        (descend(w, keep, rate, update), DionState { momentum: turn(momentum), q })
    }

    fn to_device(state: DionState, device: &Device) -> DionState {
        DionState { momentum: state.momentum.to_device(device), q: state.q.to_device(device) }
    }
}
