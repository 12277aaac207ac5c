//! Resets of moments in the middle of a run, as in the restarts of ReLoRA ("ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, Optimizer};
use burn::tensor::{Device, Tensor};
use lowrank_kernels::host::Memory;
use lowrank_kernels::random::generator;
use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::change::WeightChange;
use crate::check;
use crate::error::OptimError;

/// Elements of a moment that a reset sets to 0. Step counters are kept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MomentReset {
    /// All of them.
    Zero,
    /// Those whose magnitude is at most this quantile, interpolated linearly.
    Magnitude(f64),
    /// Each value is zeroed with this probability.
    Random(f64),
}

impl MomentReset {
    /// Rejects a ratio outside 0 to 1.
    pub fn validate(self) -> Result<(), OptimError> {
        match self {
            Self::Zero => Ok(()),
            Self::Magnitude(ratio) | Self::Random(ratio) if ratio > 0.0 && ratio < 1.0 => Ok(()),
            Self::Magnitude(ratio) | Self::Random(ratio) => {
                check::refused("reset", ratio, "the ratio must be above 0 and below 1, such as magnitude:0.9")
            }
        }
    }

    /// Applies the reset. The mask of [`MomentReset::Random`] depends only on (seed, key, count).
    pub fn apply(self, values: &mut [f32], [seed, key, count]: [u64; 3]) {
        match self {
            Self::Zero => values.fill(0.0),
            Self::Magnitude(ratio) => {
                let threshold = quantile(values, ratio);
                for value in values.iter_mut().filter(|value| f64::from(value.abs()) <= threshold) {
                    *value = 0.0;
                }
            }
            Self::Random(ratio) => {
                let mut random = generator(seed, key, count);
                for value in values {
                    if random.random::<f64>() < ratio {
                        *value = 0.0;
                    }
                }
            }
        }
    }
}

/// The quantile of the magnitudes, between two of them in proportion.
fn quantile(values: &[f32], ratio: f64) -> f64 {
    let mut sizes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
    let place = ratio * sizes.len().saturating_sub(1) as f64;
    let (below, share) = (place.floor() as usize, place.fract());
    if below >= sizes.len() {
        return 0.0;
    }
    let (_, low, above) = sizes.select_nth_unstable_by(below, f32::total_cmp);
    let low = f64::from(*low);
    let high = above.iter().copied().min_by(f32::total_cmp).map_or(low, f64::from);
    low + (high - low) * share
}

impl fmt::Display for MomentReset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zero"),
            Self::Magnitude(ratio) => write!(f, "magnitude:{ratio}"),
            Self::Random(ratio) => write!(f, "random:{ratio}"),
        }
    }
}

impl From<MomentReset> for String {
    fn from(keep: MomentReset) -> Self {
        keep.to_string()
    }
}

impl TryFrom<String> for MomentReset {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (mode, ratio) = text.split_once(':').unwrap_or((&text, ""));
        let number = ratio.parse::<f64>();
        match (mode, number) {
            ("zero", _) if text == "zero" => Ok(Self::Zero),
            ("magnitude", Ok(ratio)) => Ok(Self::Magnitude(ratio)),
            ("random", Ok(ratio)) => Ok(Self::Random(ratio)),
            _ => Err("must be zero, magnitude:RATIO or random:RATIO, such as magnitude:0.9".into()),
        }
    }
}

/// An optimizer whose moments can be reset.
pub trait ResetMoments: Optimizer {
    /// Applies `change` to the elements of each moment in order; the remaining state is unchanged.
    fn reset<const D: usize>(&self, state: Self::State<D>, change: &mut dyn FnMut(&mut [f32])) -> Self::State<D>;
}

/// Applies `change` to the elements of a tensor.
pub(crate) fn changed<const D: usize>(moment: Tensor<D>, change: &mut dyn FnMut(&mut [f32])) -> Tensor<D> {
    let mut memory = Memory::of(moment);
    change(memory.write());
    memory.tensor()
}

/// One reset.
#[derive(Clone, Copy, Debug)]
pub struct ResetOrder {
    /// Elements that it sets to 0.
    pub reset: MomentReset,
    /// Seed of the random mask.
    pub seed: u64,
    /// Number of the reset in the run, from 1.
    pub number: u64,
}

/// Handle of optimizers whose moments can be reset.
///
/// `ModuleOptimizer` shows a state only to the optimizer that steps its parameter: a reset is a step in which such an optimizer leaves the
/// parameter alone and changes its state instead.
#[derive(Clone, Debug, Default)]
pub struct MomentResets(Arc<Mutex<Option<ResetOrder>>>);

impl MomentResets {
    /// Lets an optimizer follow this handle; `key` is that of its random draws.
    pub fn follow<O: ResetMoments>(&self, optimizer: O, key: u64) -> Resettable<O> {
        Resettable { optimizer, key, resets: self.clone() }
    }

    /// Resets the moments of these parameters. Every optimizer in `optimizer` that steps one of them must follow this handle.
    pub fn apply<M: Module>(
        &self,
        reset: ResetOrder,
        optimizer: &mut ModuleOptimizer,
        module: M,
        parameters: &[ParamId],
    ) -> M {
        let mut named = Named { parameters, grads: GradientsParams::new() };
        module.visit(&mut named);
        *self.order() = Some(reset);
        let module = optimizer.step(0.0, module, named.grads);
        *self.order() = None;
        module
    }

    fn order(&self) -> MutexGuard<'_, Option<ResetOrder>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Selects parameters: their values are used in place of gradients, which are ignored.
struct Named<'a> {
    parameters: &'a [ParamId],
    grads: GradientsParams,
}

impl ModuleVisitor for Named<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.parameters.contains(&param.id) {
            self.grads.register(param.id, param.val().inner());
        }
    }
}

/// An optimizer that follows a [`MomentResets`].
#[derive(Clone, Debug)]
pub struct Resettable<O> {
    optimizer: O,
    key: u64,
    resets: MomentResets,
}

impl<O: ResetMoments> Optimizer for Resettable<O> {
    type State<const D: usize> = O::State<D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let order = *self.resets.order();
        let Some(ResetOrder { reset: keep, seed, number }) = order else {
            return self.optimizer.step(lr, tensor, grad, state);
        };
        let mut moment = 0;
        let mut change = |values: &mut [f32]| {
            keep.apply(values, [seed, self.key.wrapping_add(moment), number]);
            moment += 1;
        };
        (tensor, state.map(|state| self.optimizer.reset(state, &mut change)))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        O::to_device(state, device)
    }
}

impl<O: ResetMoments + WeightChange> WeightChange for Resettable<O> {
    fn change<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        if self.resets.order().is_none() {
            return self.optimizer.change(lr, tensor, grad, state);
        }
        let (_, state) = self.step(lr, tensor.clone(), grad, state);
        (tensor.zeros_like(), state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::adamw::{AdamWConfig, AdamWState};

    #[test]
    fn words_read_back_and_others_are_refused() {
        for text in ["zero", "magnitude:0.9", "random:0.999"] {
            assert_eq!(MomentReset::try_from(text.to_string()).unwrap().to_string(), text);
        }
        for text in ["", "none", "zero:0.5", "magnitude", "random:much", "zero,random:0.9"] {
            assert!(MomentReset::try_from(text.to_string()).unwrap_err().contains("magnitude:0.9"), "{text}");
        }
        for keep in [MomentReset::Magnitude(0.0), MomentReset::Random(1.0), MomentReset::Magnitude(f64::NAN)] {
            assert!(keep.validate().is_err(), "{keep}");
        }
    }

    #[test]
    fn the_quantile_lies_between_two_magnitudes_in_proportion() {
        let values = [-4.0, 1.0, 3.0, -2.0, 0.0];
        for (ratio, expected) in [(0.5, 2.0), (0.9, 3.6), (0.05, 0.2)] {
            assert!((quantile(&values, ratio) - expected).abs() < 1e-12, "{ratio}");
        }
        let mut kept = values;
        MomentReset::Magnitude(0.5).apply(&mut kept, [0; 3]);
        assert_eq!(kept, [-4.0, 0.0, 3.0, 0.0, 0.0], "the value at the threshold goes");
    }

    #[test]
    fn random_reset_keeps_the_expected_fraction_and_is_reproducible() {
        let draw = |numbers| {
            let mut values = vec![1.0; 10_000];
            MomentReset::Random(0.8).apply(&mut values, numbers);
            values
        };
        let kept: f32 = draw([1, 2, 3]).iter().sum();
        assert!((kept - 2000.0).abs() < 200.0, "{kept}");
        assert_eq!(draw([1, 2, 3]), draw([1, 2, 3]));
        assert_ne!(draw([1, 2, 3]), draw([1, 2, 4]));
    }

    /// With the moments at 0 and a counter that no longer corrects their bias, the step is `0.1 / sqrt(0.001)` learning rates.
    #[test]
    fn the_first_step_after_a_reset_is_about_three_times_as_long() {
        let optimizer = AdamWConfig::new().build();
        let zero = Tensor::<1>::zeros([4], &Device::default());
        let state = AdamWState { time: 100_000, moment_1: zero.clone() + 3.0, moment_2: zero.clone() + 9.0 };
        let state = optimizer.reset(state, &mut |values| values.fill(0.0));
        assert_eq!(state.time, 100_000);
        let (moved, _) = optimizer.step(1.0, zero.clone(), zero + 0.5, Some(state));
        let moved = moved.abs().max().into_scalar::<f32>();
        assert!((moved - 0.1 / 0.001f32.sqrt()).abs() < 1e-3, "{moved}");
    }
}
