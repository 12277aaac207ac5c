//! Momentum with orthogonalised updates.

use burn::config::Config;
use burn::optim::RecordState;
use burn::tensor::{DType, Device, Tensor};
use lowrank_kernels::elementwise::descend;
use lowrank_kernels::newton_schulz::Coefficients;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adam::AdamOptions;
use crate::error::OptimError;
use crate::matrix::{ByMatrix, MatrixRule, matrix_method};
use crate::matrix_id::MatrixId;
use crate::methods::orthogonal::{NewtonSchulzOptions, OrthogonalOptions, newton_schulz_builders};
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::registry::options;
use crate::state::reset::{ResetMoments, changed};

/// Accumulation of gradients in the momentum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MomentumRule {
    /// `M <- mu M + (1 - mu) G`.
    Ema,
    /// `M <- mu M + G`.
    HeavyBall,
}

/// Configuration of Muon: "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024), with the scale of "Muon is Scalable for
/// LLM Training" (arXiv 2502.16982).
///
/// For matrices inside a model. The embedding and the head run without an error and are silently worse: give Muon only what
/// [`ParameterRoles`](crate::ParameterRoles) finds. Everything else uses AdamW.
#[derive(Config, Debug, JsonSchema)]
pub struct MuonConfig {
    /// Decay of the momentum (the paper's mu).
    #[config(default = 0.95)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub momentum: f64,
    /// Accumulation of gradients in the momentum.
    #[config(default = "MomentumRule::Ema")]
    pub momentum_rule: MomentumRule,
    /// Use Nesterov momentum.
    #[config(default = true)]
    pub nesterov: bool,
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

/// Muon's rule for one matrix.
#[derive(Clone, Debug)]
pub struct Muon {
    config: MuonConfig,
}

/// State of momentum methods for one matrix.
#[derive(Clone, Debug, RecordState)]
pub struct MomentumState {
    /// Momentum, as large as the matrix.
    pub momentum: Tensor<2>,
}

impl MomentumState {
    pub(crate) fn zeros(shape: [usize; 2], device: &Device) -> Self {
        Self { momentum: Tensor::zeros(shape, (device, DType::F32)) }
    }

    pub(crate) fn on(self, device: &Device) -> Self {
        Self { momentum: self.momentum.to_device(device) }
    }
}

impl MuonConfig {
    /// Rejects values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        options::validate(self)?;
        self.iteration.validate()
    }

    /// Bytes of state for a matrix of this shape.
    pub fn state_bytes(&self, [rows, columns]: [usize; 2]) -> usize {
        4 * rows * columns
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = method!(
    resettable MuonConfig,
    MuonConfig::new(),
    Entry {
        papers: &[Paper { title: "Muon: An optimizer for hidden layers in neural networks", place: "2502.16982" }],
        memory: "RC",
        needs: &["hidden matrices"],
        lr: Some(0.02),
        ..Entry::plain(Kind::Optimizer, "muon", "orthogonalised momentum")
    }
);

newton_schulz_builders!(MuonConfig);
matrix_method!(MuonConfig, Muon);

impl MatrixRule for Muon {
    type State = MomentumState;

    fn takes(&self, _shape: [usize; 2]) -> bool {
        true
    }

    fn fresh(&self, shape: [usize; 2], _place: MatrixId, device: &Device) -> MomentumState {
        MomentumState::zeros(shape, device)
    }

    fn step(&self, lr: f64, w: Tensor<2>, g: Tensor<2>, state: MomentumState) -> (Tensor<2>, MomentumState) {
        let c = &self.config;
        let share = if c.momentum_rule == MomentumRule::Ema { 1.0 - c.momentum } else { 1.0 };
        let momentum = state.momentum.mul_scalar(c.momentum) + g.clone().mul_scalar(share);
        let update = match c.nesterov {
            true => g.mul_scalar(share) + momentum.clone().mul_scalar(c.momentum),
            false => momentum.clone(),
        };
        let update = c.iteration.orthogonal(update);
        let rate = lr * c.update.factor(w.dims());
        (descend(w, 1.0 - lr * c.adam.weight_decay, rate, update), MomentumState { momentum })
    }

    fn to_device(state: MomentumState, device: &Device) -> MomentumState {
        state.on(device)
    }
}

impl ResetMoments for ByMatrix<Muon> {
    fn reset<const D: usize>(&self, state: Self::State<D>, change: &mut dyn FnMut(&mut [f32])) -> Self::State<D> {
        let plain = state.plain.map(|plain| self.others().reset(plain, change));
        let momentum = |state: MomentumState| MomentumState { momentum: changed(state.momentum, change) };
        Self::State { plain, matrix: state.matrix.map(momentum) }
    }
}
