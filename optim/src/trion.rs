//! Momentum whose leading DCT columns are made orthogonal.

use burn::config::Config;
use burn::tensor::{Device, Tensor};
use lowrank_kernels::dct::{Dct, DctBasis};
use lowrank_kernels::elementwise::descend;
use lowrank_kernels::host::values;
use lowrank_kernels::newton_schulz::{Coefficients, newton_schulz};

use crate::dct_adamw::Transform;
use crate::matrix::{MatrixRule, Place, matrix_method};
use crate::muon::MomentumState;
use crate::orthogonal::{Scaling, check_steps};
use crate::projected::Norm;
use crate::projector::{DctColumns, best};
use crate::subspace::index_tensor;
use crate::{AdamWConfig, OptimError, check};

/// Configuration of Trion: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models" (Modoranu et al.,
/// arXiv 2505.17967).
///
/// Each step takes the columns of a DCT matrix that carry most of the momentum, makes that part orthogonal and moves the weights by it; what was
/// used decays in the momentum, the rest stays. The momentum is as large as the matrix: Trion saves no state against Muon but work, and what
/// workers would have to exchange. For matrices inside a model; everything else takes AdamW.
#[derive(Config, Debug)]
pub struct TrionConfig {
    /// Basis vectors, at least 1. A matrix whose projected side is smaller takes AdamW.
    pub rank: usize,
    /// Share of the used part that stays in the momentum, from 0 to below 1.
    #[config(default = 0.95)]
    pub momentum: f64,
    /// The basis.
    #[config(default = "DctBasis::Dct3")]
    pub basis: DctBasis,
    /// How coefficients are computed; speed alone.
    #[config(default = "Transform::Fft")]
    pub transform: Transform,
    /// Newton-Schulz steps, at least 1.
    #[config(default = 5)]
    pub ns_steps: usize,
    /// Coefficients of the iteration.
    #[config(default = "Coefficients::Jordan")]
    pub coefficients: Coefficients,
    /// Whether the iteration's products are in bf16.
    #[config(default = false)]
    pub ns_bf16: bool,
    /// Scale of the update by the shape of the matrix.
    #[config(default = "Scaling::Kj")]
    pub scaling: Scaling,
    /// Whether matrices are stored `[d_out, d_in]`, which Burn's linear layers are not.
    #[config(default = false)]
    pub rows_are_outputs: bool,
    /// Decoupled weight decay, 0 or greater.
    #[config(default = 0.0)]
    pub weight_decay: f64,
    /// Learning rate of everything else as a multiple of that of the matrices.
    #[config(default = 0.015)]
    pub others_lr_scale: f64,
    /// Decay of the first moment of everything else.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// Decay of the second moment of everything else.
    #[config(default = 0.95)]
    pub beta_2: f64,
    /// Epsilon of everything else.
    #[config(default = 1e-10)]
    pub epsilon: f64,
}

/// Trion's rule for one matrix.
#[derive(Clone, Debug)]
pub struct Trion {
    config: TrionConfig,
}

impl TrionConfig {
    /// Refuses values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        check::at_least_one("rank", self.rank)?;
        check::fraction("momentum", self.momentum)?;
        check::positive("others_lr_scale", self.others_lr_scale)?;
        check::adam(self.beta_1, self.beta_2, self.epsilon, self.weight_decay)?;
        check_steps(self.ns_steps, self.coefficients)
    }

    fn rule(&self) -> Trion {
        Trion { config: self.clone() }
    }

    /// AdamW of everything else.
    pub fn others(&self) -> AdamWConfig {
        AdamWConfig::adam(self.beta_1, self.beta_2, self.epsilon, self.weight_decay).with_lr_scale(self.others_lr_scale)
    }

    /// Bytes of state for a matrix of this shape.
    pub fn state_bytes(&self, [rows, columns]: [usize; 2]) -> usize {
        if self.rank <= rows.min(columns) { 4 * rows * columns } else { 8 * rows * columns }
    }
}

matrix_method!(TrionConfig, Trion);

impl MatrixRule for Trion {
    type State = MomentumState;

    fn takes(&self, [rows, columns]: [usize; 2]) -> bool {
        self.config.rank <= rows.min(columns)
    }

    fn fresh(&self, shape: [usize; 2], _place: Place, device: &Device) -> MomentumState {
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
        let chosen = index_tensor(best(&scores, c.rank), &device);
        let low = coefficients.select(axis, chosen.clone());
        let q = Dct::of(shape[axis]).tensor(c.basis, &device).select(1, chosen);
        let back = |low: Tensor<2>| match right {
            true => low.matmul(q.clone().transpose()),
            false => q.clone().matmul(low),
        };
        let momentum = descend(b, 1.0, 1.0 - c.momentum, back(low.clone()));
        let update = back(newton_schulz(low, c.ns_steps, c.coefficients, c.ns_bf16));
        let rate = lr * c.scaling.factor(shape, c.rows_are_outputs);
        (descend(w, 1.0 - lr * c.weight_decay, rate, update), MomentumState { momentum })
    }

    fn to_device(state: MomentumState, device: &Device) -> MomentumState {
        state.on(device)
    }
}
