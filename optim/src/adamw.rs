//! Adam with decoupled weight decay.

use burn::config::Config;
use burn::optim::{ModuleOptimizer, Optimizer, RecordState};
use burn::tensor::{DType, Device, Tensor};
use schemars::JsonSchema;

use crate::adam::{AdamOptions, adam_builders};
use crate::reset::{ResetMoments, changed};
use crate::{OptimError, registry};

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

adam_builders!(AdamWConfig);

impl AdamWConfig {
    /// Refuses values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        Ok(registry::validate(self)?)
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

/// Factors of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    pub beta_1: f32,
    pub beta_2: f32,
    /// One less the first decay, rounded once: in f32 the difference would lose five digits.
    pub share_1: f32,
    /// One less the second decay.
    pub share_2: f32,
    pub epsilon: f32,
    /// What remains of a weight after decay.
    pub keep: f32,
    /// Learning rate over the first bias correction.
    pub rate: f32,
    /// One over the root of the second bias correction.
    pub root: f32,
}

impl AdamWConfig {
    /// Factors of step `time`, counted from 1.
    fn factors(&self, lr: f64, time: usize) -> Factors {
        let lr = lr * self.lr_scale;
        let AdamOptions { beta_1, beta_2, epsilon, weight_decay } = self.adam;
        let correction = |beta: f64| 1.0 - beta.powf(time as f64);
        let (keep, root) = (1.0 - lr * weight_decay, correction(beta_2).sqrt().recip());
        let rate = lr / correction(beta_1);
        Factors {
            beta_1: beta_1 as f32,
            beta_2: beta_2 as f32,
            share_1: (1.0 - beta_1) as f32,
            share_2: (1.0 - beta_2) as f32,
            epsilon: if self.legacy_epsilon { epsilon * root } else { epsilon } as f32,
            keep: keep as f32,
            // Decay that comes after also shrinks the update.
            rate: if self.decay_after { rate * keep } else { rate } as f32,
            root: root as f32,
        }
    }
}

impl AdamW {
    pub(crate) fn factors(&self, lr: f64, time: usize) -> Factors {
        self.config.factors(lr, time)
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
        let dtype = tensor.dtype();
        let (tensor, grad) = (tensor.cast(DType::F32), grad.cast(DType::F32));
        let state = state.unwrap_or_else(|| {
            let zeros = || Tensor::zeros(tensor.shape(), (&tensor.device(), DType::F32));
            AdamWState { time: 0, moment_1: zeros(), moment_2: zeros() }
        });
        let time = state.time + 1;
        let factors = self.config.factors(lr, time);
        let moments = (state.moment_1, state.moment_2);
        let (tensor, (moment_1, moment_2)) = update(tensor, grad, moments, factors);
        (tensor.cast(dtype), Some(AdamWState { time, moment_1, moment_2 }))
    }

    fn to_device<const D: usize>(state: AdamWState<D>, device: &Device) -> AdamWState<D> {
        AdamWState {
            time: state.time,
            moment_1: state.moment_1.to_device(device),
            moment_2: state.moment_2.to_device(device),
        }
    }
}

impl ResetMoments for AdamW {
    fn reset<const D: usize>(&self, state: AdamWState<D>, change: &mut dyn FnMut(&mut [f32])) -> AdamWState<D> {
        let moment_1 = changed(state.moment_1, change);
        AdamWState { moment_1, moment_2: changed(state.moment_2, change), ..state }
    }
}

type Moments<const D: usize> = (Tensor<D>, Tensor<D>);

fn update<const D: usize>(w: Tensor<D>, g: Tensor<D>, moments: Moments<D>, f: Factors) -> (Tensor<D>, Moments<D>) {
    #[cfg(feature = "flex")]
    if lowrank_kernels::host::is_cpu(&w.device()) {
        return fused::update(w, g, moments, f);
    }
    composed(w, g, moments, f)
}

fn composed<const D: usize>(w: Tensor<D>, g: Tensor<D>, (m, v): Moments<D>, f: Factors) -> (Tensor<D>, Moments<D>) {
    let m = m.mul_scalar(f.beta_1) + g.clone().mul_scalar(f.share_1);
    let v = v.mul_scalar(f.beta_2) + g.square().mul_scalar(f.share_2);
    let step = m.clone() / (v.clone().sqrt().mul_scalar(f.root).add_scalar(f.epsilon));
    (w.mul_scalar(f.keep) - step.mul_scalar(f.rate), (m, v))
}

#[cfg(feature = "flex")]
mod fused {
    use burn::backend::Flex;
    use burn::tensor::Tensor;
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use super::{Factors, Moments};
    use lowrank_kernels::elementwise::CHUNK;
    use lowrank_kernels::vectorised::vectorised;

    /// In place, where nobody else holds the tensors.
    pub fn update<const D: usize>(
        w: Tensor<D>,
        g: Tensor<D>,
        (m, v): Moments<D>,
        f: Factors,
    ) -> (Tensor<D>, Moments<D>) {
        let (mut w, g, mut m, mut v) = (flex(w), flex(g), flex(m), flex(v));
        {
            let weights = w.storage_mut::<f32>().par_chunks_mut(CHUNK);
            let moments =
                m.storage_mut::<f32>().par_chunks_mut(CHUNK).zip(v.storage_mut::<f32>().par_chunks_mut(CHUNK));
            weights.zip(g.storage::<f32>().par_chunks(CHUNK)).zip(moments).for_each(|((w, g), (m, v))| {
                vectorised(
                    #[inline(always)]
                    || {
                        for ((w, g), (m, v)) in w.iter_mut().zip(g).zip(m.iter_mut().zip(v.iter_mut())) {
                            *m = f.beta_1 * *m + f.share_1 * g;
                            *v = f.beta_2 * *v + f.share_2 * (g * g);
                            *w = *w * f.keep - f.rate * (*m / (v.sqrt() * f.root + f.epsilon));
                        }
                    },
                );
            });
        }
        (tensor(w), (tensor(m), tensor(v)))
    }

    /// The backend's tensor, in row-major order from the first value of its memory to the last.
    fn flex<const D: usize>(x: Tensor<D>) -> FlexTensor {
        let x = match x.try_into_primitive::<Flex>() {
            Ok(x) => x,
            Err(error) => unreachable!("the device was checked: {error:?}"),
        };
        let whole = x.is_contiguous() && x.storage::<f32>().len() == x.layout().num_elements();
        if whole { x } else { x.to_contiguous() }
    }

    fn tensor<const D: usize>(x: FlexTensor) -> Tensor<D> {
        Tensor::from_primitive::<Flex>(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    fn values(count: usize, seed: f32) -> Tensor<2> {
        let values = (0..count).map(|i| (i as f32 * 0.37 + seed).sin()).collect::<Vec<f32>>();
        Tensor::from_data(TensorData::new(values, [count / 5, 5]), &Device::default())
    }

    fn host(x: Tensor<2>) -> Vec<f32> {
        x.into_data().convert::<f32>().try_into_vec().unwrap()
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
    fn the_fused_form_equals_the_composed_one() {
        let f = AdamWConfig::new().with_weight_decay(0.1).factors(0.01, 3);
        for scale in [1.0, 1e-20, 1e15] {
            let inputs = || {
                (values(50_005, 1.0), values(50_005, 2.0) * scale, (values(50_005, 3.0), values(50_005, 4.0).square()))
            };
            let ((w, g, moments), (w2, g2, moments2)) = (inputs(), inputs());
            let (ours, (m, v)) = update(w, g, moments, f);
            let (expected, (m2, v2)) = composed(w2, g2, moments2, f);
            near(host(ours), host(expected), 1e-6);
            near(host(m), host(m2), 1e-6);
            near(host(v), host(v2), 1e-6);
        }
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
