//! Momentum with orthogonalised updates from its leading DCT columns.

use burn::config::Config;
use burn::tensor::{Device, Tensor};
use lowrank_kernels::dct::{Dct, DctBasis};
use lowrank_kernels::elementwise::descend;
use lowrank_kernels::host::values;
use lowrank_kernels::newton_schulz::Coefficients;
use lowrank_kernels::ops::MatrixProduct;
use schemars::JsonSchema;

use crate::adam::AdamOptions;
use crate::error::OptimError;
use crate::matrix::{MatrixRule, matrix_method};
use crate::matrix_id::MatrixId;
use crate::methods::dct_adamw::Transform;
use crate::methods::muon::MomentumState;
use crate::methods::orthogonal::{NewtonSchulzOptions, OrthogonalOptions, newton_schulz_builders};
use crate::projected::config::Norm;
use crate::projected::projector::{DctColumns, top_k_indices};
use crate::projected::subspace::index_tensor;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::registry::options;

/// Configuration of Trion: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models" (Modoranu et al.,
/// arXiv 2505.17967).
///
/// Each step takes the columns of a DCT matrix that carry most of the momentum, makes that part orthogonal and moves the weights by it; what was
/// used decays in the momentum, the rest stays. The momentum is as large as the matrix: Trion saves no state against Muon but work, and what
/// workers would have to exchange. For matrices inside a model; everything else uses AdamW.
#[derive(Config, Debug, JsonSchema)]
pub struct TrionConfig {
    /// Rank of the projection; matrices with a smaller projected dimension use AdamW.
    #[schemars(range(min = 1, max = 1_000_000), extend("x-required" = true))]
    pub rank: usize,
    /// Fraction of the applied component kept in the momentum.
    #[config(default = 0.95)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub momentum: f64,
    /// Orthonormal basis.
    #[config(default = "DctBasis::Dct3")]
    pub basis: DctBasis,
    /// Computation of the coefficients; affects speed only.
    #[config(default = "Transform::Fft")]
    pub transform: Transform,
    /// Options of the Newton-Schulz iteration.
    #[config(default = "NewtonSchulzOptions::new()")]
    pub iteration: NewtonSchulzOptions,
    /// Options of the update and of all other parameters.
    #[config(default = "OrthogonalOptions::new()")]
    pub update: OrthogonalOptions,
    /// Options of AdamW for all other parameters; its weight decay applies to the matrices too.
    #[config(default = "AdamOptions::new().with_beta_2(0.95).with_epsilon(1e-10)")]
    pub adam: AdamOptions,
}

/// Trion's rule for one matrix.
#[derive(Clone, Debug)]
pub struct Trion {
    config: TrionConfig,
}

impl TrionConfig {
    /// Rejects values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        options::validate(self)?;
        self.iteration.validate()
    }

    /// Bytes of state for a matrix of this shape.
    pub fn state_bytes(&self, [rows, columns]: [usize; 2]) -> usize {
        if self.rank <= rows.min(columns) { 4 * rows * columns } else { 8 * rows * columns }
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = method!(
    TrionConfig,
    TrionConfig::new(0),
    Entry {
        papers: &[Paper {
            title: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
            place: "2505.17967"
        }],
        memory: "RC",
        needs: &["hidden matrices whose projected side is at least the rank"],
        lr: Some(0.02),
        ..Entry::plain(Kind::Optimizer, "trion", "momentum whose leading DCT columns are orthogonalised")
    }
);

newton_schulz_builders!(TrionConfig);
matrix_method!(TrionConfig, Trion);

impl MatrixRule for Trion {
    type State = MomentumState;

    fn takes(&self, [rows, columns]: [usize; 2]) -> bool {
        self.config.rank <= rows.min(columns)
    }

    fn fresh(&self, shape: [usize; 2], _place: MatrixId, device: &Device) -> MomentumState {
        MomentumState::zeros(shape, device)
    }

    fn step(&self, lr: f64, w: Tensor<2>, g: Tensor<2>, state: MomentumState) -> (Tensor<2>, MomentumState) {
        let c = &self.config;
        let (shape, device) = (w.dims(), w.device());
        let right = shape[0] >= shape[1];
        let axis = usize::from(right);
        let columns = DctColumns {
            basis: c.basis,
            fft: c.transform == Transform::Fft && c.basis != DctBasis::Random,
            norm: Norm::L1,
            weighted: false,
        };
        let b = state.momentum + g;
        let coefficients = columns.coefficients(&b, right);
        let scores = values(coefficients.clone().abs().sum_dim(1 - axis));
        let chosen = index_tensor(top_k_indices(&scores, c.rank), &device);
        let low = coefficients.select(axis, chosen.clone());
        let q = Dct::of(shape[axis]).tensor(c.basis, &device).select(1, chosen);
        let back = |low: Tensor<2>| match right {
            true => low.times(q.clone().transpose()),
            false => q.clone().times(low),
        };
        let momentum = descend(b, 1.0, 1.0 - c.momentum, back(low.clone()));
        let update = back(c.iteration.orthogonal(low));
        let rate = lr * c.update.factor(shape);
        (descend(w, 1.0 - lr * c.adam.weight_decay, rate, update), MomentumState { momentum })
    }

    fn to_device(state: MomentumState, device: &Device) -> MomentumState {
        state.on(device)
    }
}
