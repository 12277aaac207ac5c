//! Adam with decoupled weight decay.

use burn::config::Config;
use burn::optim::{ModuleOptimizer, Optimizer, RecordState};
use burn::tensor::{DType, Device, Tensor};
use lowrank_kernels::elementwise::{self, Adam};
use schemars::JsonSchema;

use crate::adam::{AdamOptions, adam_builders};
use crate::change::WeightChange;
use crate::error::OptimError;
use crate::precision::in_f32;
use crate::registry::options;
use crate::state::reset::{ResetMoments, changed};

/// Configuration of [`AdamW`].
#[derive(Config, Debug, JsonSchema)]
pub struct AdamWConfig {
    /// Options of Adam.
    #[config(default = "AdamOptions::new()")]
    pub adam: AdamOptions,
    /// Add epsilon before the bias of the second moment is corrected, as GaLore and its relatives do.
    ///
    /// It then acts about 30 times stronger at the first step.
    #[config(default = false)]
    pub legacy_epsilon: bool,
    /// Decay weights after the update rather than before.
    #[config(default = false)]
    pub decay_after: bool,
    /// Learning rate of hidden matrices as a multiple of that of all other parameters.
    #[config(default = 1.0)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub lr_scale: f64,
}

/// AdamW: "Decoupled Weight Decay Regularization" (Loshchilov and Hutter, arXiv 1711.05101).
///
/// `w <- w (1 - lr wd)`, then `w <- w - lr (m / c1) / (sqrt(v / c2) + eps)` with bias corrections `c = 1 - beta^t`. Moments and arithmetic are f32
/// whatever the type of the parameter. On the CPU backend the whole step is one pass over memory.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
}

/// State of [`AdamW`] for one parameter.
#[derive(Clone, Debug, RecordState)]
pub struct AdamWState<const D: usize> {
    /// Steps taken.
    pub time: usize,
    /// Moving average of the gradient.
    pub moment_1: Tensor<D>,
    /// Moving average of its square.
    pub moment_2: Tensor<D>,
}

impl<const D: usize> AdamWState<D> {
    /// The state before the first step of a parameter.
    pub(crate) fn zeros_like(tensor: &Tensor<D>) -> Self {
        let zeros = || Tensor::zeros(tensor.shape(), (&tensor.device(), DType::F32));
        Self { time: 0, moment_1: zeros(), moment_2: zeros() }
    }
}

adam_builders!(AdamWConfig);

impl AdamWConfig {
    /// Rejects values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        Ok(options::validate(self)?)
    }

    /// The bare optimizer, for [`ModuleOptimizer::with_group`].
    pub fn build(&self) -> AdamW {
        AdamW { config: self.clone() }
    }

    /// The optimizer of a whole module.
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.build())
    }
}

impl AdamWConfig {
    /// The step at `time`, counted from 1.
    pub(crate) fn at(&self, lr: f64, time: usize) -> elementwise::AdamW {
        let lr = lr * self.lr_scale;
        let AdamOptions { beta_1, beta_2, epsilon, weight_decay } = self.adam;
        let correction = |beta: f64| 1.0 - beta.powf(time as f64);
        let (keep, root) = (1.0 - lr * weight_decay, correction(beta_2).sqrt().recip());
        let rate = lr / correction(beta_1);
        let epsilon = if self.legacy_epsilon { epsilon * root } else { epsilon };
        elementwise::AdamW {
            adam: Adam { root: root as f32, ..Adam::new(beta_1, beta_2, epsilon) },
            keep: keep as f32,
            // Decay after the update also shrinks the update.
            rate: if self.decay_after { rate * keep } else { rate } as f32,
        }
    }
}

impl AdamW {
    /// The configuration.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }
}

impl Optimizer for AdamW {
    type State<const D: usize> = AdamWState<D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<AdamWState<D>>,
    ) -> (Tensor<D>, Option<AdamWState<D>>) {
        let state = state.unwrap_or_else(|| AdamWState::zeros_like(&tensor));
        let time = state.time + 1;
        let step = self.config.at(lr, time);
        in_f32(tensor, grad, |tensor, grad| {
            let [tensor, moment_1, moment_2] = elementwise::adamw(tensor, grad, state.moment_1, state.moment_2, step);
            (tensor, Some(AdamWState { time, moment_1, moment_2 }))
        })
    }

    fn to_device<const D: usize>(state: AdamWState<D>, device: &Device) -> AdamWState<D> {
        AdamWState {
            time: state.time,
            moment_1: state.moment_1.to_device(device),
            moment_2: state.moment_2.to_device(device),
        }
    }
}

impl WeightChange for AdamW {
    fn change<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let decay = lr * self.config().lr_scale * self.config().adam.weight_decay;
        let (moved, state) = self.step(lr, tensor.zeros_like(), grad, state);
        (moved - tensor.mul_scalar(decay), state)
    }
}

impl ResetMoments for AdamW {
    fn reset<const D: usize>(&self, state: AdamWState<D>, change: &mut dyn FnMut(&mut [f32])) -> AdamWState<D> {
        let moment_1 = changed(state.moment_1, change);
        AdamWState { moment_1, moment_2: changed(state.moment_2, change), ..state }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;
    use lowrank_kernels::host::values as host;

    fn values(count: usize, seed: f32) -> Tensor<2> {
        let values = (0..count).map(|i| (i as f32 * 0.37 + seed).sin()).collect::<Vec<f32>>();
        Tensor::from_data(TensorData::new(values, [count / 5, 5]), &Device::default())
    }

    fn near(a: Vec<f32>, b: Vec<f32>, tolerance: f32) {
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{a} {b}");
        }
    }

    #[test]
    fn equals_the_optimizer_of_burn() {
        let ours = AdamWConfig::new().with_weight_decay(0.1).build();
        let burns = burn::optim::AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.1).build();
        let (mut a, mut b) = (values(20_000, 0.5), values(20_000, 0.5));
        let (mut state_a, mut state_b) = (None, None);
        for step in 0..10 {
            let grad = values(20_000, step as f32);
            (a, state_a) = ours.step(0.01, a, grad.clone(), state_a);
            (b, state_b) = burns.step(0.01, b, grad, state_b);
        }
        near(host(a), host(b), 2e-6);
    }

    #[test]
    fn views_and_shared_tensors_are_not_written_through() {
        let whole = values(40, 0.0);
        let part = whole.clone().narrow(0, 2, 3);
        let before = host(whole.clone());
        let (moved, _) = AdamWConfig::new().build().step(0.1, part.clone(), values(15, 1.0), None);
        assert_eq!(host(whole), before);
        assert_ne!(host(moved), host(part));
        let turned = values(25, 0.0).transpose();
        let (a, _) = AdamWConfig::new().build().step(0.1, turned.clone(), values(25, 1.0).transpose(), None);
        let (b, _) = AdamWConfig::new().build().step(0.1, values(25, 0.0), values(25, 1.0), None);
        assert_eq!(host(a), host(b.transpose()));
    }

    #[test]
    fn half_precision_parameters_keep_their_type_and_full_moments() {
        let half = values(20, 0.0).cast(DType::BF16);
        let (moved, state) = AdamWConfig::new().build().step(0.1, half, values(20, 1.0).cast(DType::BF16), None);
        assert_eq!(moved.dtype(), DType::BF16);
        assert_eq!(state.unwrap().moment_1.dtype(), DType::F32);
    }

    #[test]
    fn zero_gradients_move_nothing_but_by_decay() {
        let w = values(20, 0.5);
        let zero = w.zeros_like();
        let (moved, state) = AdamWConfig::new().with_weight_decay(0.5).build().step(0.1, w.clone(), zero, None);
        near(host(moved), host(w * 0.95), 1e-7);
        assert!(host(state.unwrap().moment_2).iter().all(|v| *v == 0.0));
    }
}
