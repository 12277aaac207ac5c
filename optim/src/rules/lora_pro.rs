//! LoRA-Pro: gradients of the two factors of LoRA whose common step lies closest to the gradient of the weight.
//!
//! "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?" (Wang et al., arXiv 2407.18242). The official code adds one to the exponent of the
//! bias correction and fixes the scale to 2; here steps count from 1 and the scale is the adapter's.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::config::Config;
use burn::module::{Module, Param, ParamGroup, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor, TensorData};
use nalgebra::DMatrix;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::multiply::multiplied;
use super::pairs::{LoraPair, PairGradients, damped_inverse, data, eigen, matrices, take_pairs, transposed};
use crate::adam::{AdamOptions, adam_builders};
use crate::check;
use crate::error::OptimError;
use crate::methods::adamw::AdamWConfig;
use crate::part::Part;
use crate::registry::options;
use crate::state::meter::StateMeter;
use lowrank_kernels::ops::MatrixProduct;

/// Location of LoRA-Pro's moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LoraProMode {
    /// On the equivalent gradient of the weight, in the rule: `2 d_in d_out` values a layer, as full fine-tuning has. The gradients that it gives
    /// are steps: the factors take plain descent ([`SgdConfig`](burn::optim::SgdConfig) without momentum).
    #[default]
    Full,
    /// On the factors, in the optimizer, which is AdamW: `2 r (d_in + d_out)` values a layer.
    Efficient,
    /// Nowhere: the factors take plain descent.
    Sgd,
}

/// Use of the freedom that the equivalent gradient leaves; the step of the merged weight is the same to first order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LoraProX {
    /// The gradients lie as close to the plain ones as they can.
    #[default]
    Sylvester,
    /// That of the official code's ablation.
    Symmetry,
    /// It is not used.
    Zero,
}

/// Configuration of [`LoraPro`].
#[derive(Config, Debug, JsonSchema)]
pub struct LoraProConfig {
    /// Location of the moments.
    #[config(default = "LoraProMode::Full")]
    pub mode: LoraProMode,
    /// How the free part of the gradients is chosen.
    #[config(default = "LoraProX::Sylvester")]
    pub x_mode: LoraProX,
    /// Damping of the factors' products with themselves.
    #[config(default = 1e-8)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub delta: f64,
    /// Options of Adam in mode full; its weight decay acts on the whole weight, see [`LoraPro::decay`].
    #[config(default = "AdamOptions::new()")]
    pub adam: AdamOptions,
}

/// LoRA-Pro as a pass over gradients, after clipping and before the optimizer; once a step, on the sum over micro-batches.
///
/// With `g` the gradient of the weight, the step of the merged weight is to first order along `scale (A gB + gA B)`, which is brought as
/// close to `g` as it can be: the part of `g` in the column space of A and the row space of B. Only the gradients of the factors are
/// needed.
///
/// The rates of full fine-tuning suit it; those of LoRA are 5 to 10 times too large. It is a handle: clones share their state.
///
/// ```no_run
/// # use burn::module::Module;
/// # use burn::optim::GradientsParams;
/// # use lowrank_optim::OptimError;
/// # use lowrank_optim::rules::{LoraProConfig, LoraProMode};
/// # fn example<M: Module>(model: M, grads: GradientsParams) -> Result<(), OptimError> {
/// let model = model.apply_lora(burn::module::Lora::new(8, 16.0));
/// let rule = LoraProConfig::new().with_mode(LoraProMode::Efficient).init(&model)?;
/// // In every step, and in `TrainStep::optimize`:
/// let grads = rule.apply(&model, grads)?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct LoraPro {
    config: LoraProConfig,
    pairs: Vec<LoraPair>,
    /// Adam of the equivalent gradients; their states are keyed by the ids of the weights.
    moments: Arc<Mutex<ModuleOptimizer>>,
}

adam_builders!(LoraProConfig);

impl LoraProConfig {
    /// Rejects values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        options::validate(self)?;
        match self.mode {
            LoraProMode::Full => Ok(()),
            _ if self.adam.weight_decay == 0.0 => Ok(()),
            _ => check::refused(
                "weight_decay",
                self.adam.weight_decay,
                "lora-pro decays weights in mode full alone; elsewhere the optimizer does",
            ),
        }
    }

    /// The rule for a module that [`Module::apply_lora`] was called on.
    pub fn init<M: Module>(&self, module: &M) -> Result<LoraPro, OptimError> {
        self.over(module, LoraPair::of(module)?, &StateMeter::new())
    }

    /// The rule for known pairs of a module. States report to the meter.
    pub fn over(&self, part: &dyn Part, pairs: Vec<LoraPair>, meter: &StateMeter) -> Result<LoraPro, OptimError> {
        self.validate()?;
        if self.adam.weight_decay > 0.0 {
            let weights = matrices(part, &pairs.iter().map(|pair| pair.weight).collect());
            let writable = |pair: &LoraPair| weights.get(&pair.weight).is_some_and(|weight| weight.dtype().is_float());
            let times = |id: ParamId| pairs.iter().filter(|pair| pair.weight == id).count();
            if let Some(pair) = pairs.iter().find(|pair| !writable(pair) || times(pair.weight) > 1) {
                return check::refused(
                    "weight_decay",
                    self.adam.weight_decay,
                    format!(
                        "it acts on the whole weight, and that of {} is quantised or shared; set it to 0",
                        pair.path
                    ),
                );
            }
        }
        let adam = AdamWConfig::new().with_adam(self.adam.with_weight_decay(0.0)).build();
        let moments = ModuleOptimizer::from(adam.clone()).with_group(ParamGroup::all(), meter.watch(adam), None);
        Ok(LoraPro { config: self.clone(), pairs, moments: Arc::new(Mutex::new(moments)) })
    }
}

impl fmt::Debug for LoraPro {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoraPro").field("config", &self.config).field("pairs", &self.pairs).finish_non_exhaustive()
    }
}

impl LoraPro {
    /// The gradients for the optimizer. Pairs without gradients are skipped, so that one block alone is supported too; a
    /// gradient of one factor alone is an error.
    pub fn apply(&self, part: &dyn Part, mut grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        let met = take_pairs(part, &self.pairs, &mut grads, true)?;
        let full = self.config.mode == LoraProMode::Full;
        let x_mode = if full { LoraProX::Zero } else { self.config.x_mode };
        let adjusted: Vec<_> = met.into_par_iter().map(|met| Adjusted::of(met, self.config.delta, x_mode)).collect();
        for adjusted in adjusted {
            let mut adjusted = adjusted?;
            if full {
                let direction = self.direction(&adjusted);
                adjusted = adjusted.again(direction, self.config.delta, self.config.x_mode)?;
            }
            let (pair, [grad_a, grad_b]) = (adjusted.met.pair, adjusted.grads);
            grads.register(pair.a, grad_a);
            grads.register(pair.b, grad_b);
        }
        Ok(grads)
    }

    /// Adam's direction `[d_in, d_out]` on the equivalent gradient, negated.
    fn direction(&self, Adjusted { met, grads: [grad_a, grad_b] }: &Adjusted<'_>) -> Tensor<2> {
        // [gA | A] times [B over gB]: one product.
        let left = Tensor::cat(vec![grad_a.clone(), met.a.clone()], 1);
        let right = Tensor::cat(vec![met.b.clone(), grad_b.clone()], 0);
        let equivalent = left.times(right).mul_scalar(met.pair.scale);
        let mut grads = GradientsParams::new();
        let start =
            Equivalent { direction: Param::initialized(met.pair.weight, Tensor::from_inner(equivalent.zeros_like())) };
        grads.register(met.pair.weight, equivalent);
        self.moments().step(1.0, start, grads).direction.val().without_autodiff()
    }

    /// Weight decay of mode full: the whole weight, base and product, becomes `1 - lr weight_decay` times what it was. Call it between
    /// [`LoraPro::apply`] and the optimizer. The base changes: the adapter alone no longer represents the model.
    pub fn decay<M: Module>(&self, module: M, lr: f64) -> M {
        multiplied(module, &self.decay_factors(lr))
    }

    /// Factors of weights and of both factors of their products that make up [`LoraPro::decay`].
    pub fn decay_factors(&self, lr: f64) -> Vec<(ParamId, f64)> {
        let share = self.config.adam.weight_decay * lr;
        if share == 0.0 {
            return Vec::new();
        }
        let keep = 1.0 - share;
        let of_pair = |pair: &LoraPair| [(pair.weight, keep), (pair.a, keep.sqrt()), (pair.b, keep.sqrt())];
        self.pairs.iter().flat_map(of_pair).collect()
    }

    /// The pairs that it adjusts.
    pub fn pairs(&self) -> &[LoraPair] {
        &self.pairs
    }

    /// The moments of mode full, for a checkpoint.
    pub fn to_record(&self) -> OptimizerRecord {
        self.moments().to_record()
    }

    /// Restores the moments of a record.
    pub fn load_record(&self, record: OptimizerRecord) {
        let mut moments = self.moments();
        *moments = moments.clone().load_record(record);
    }

    fn moments(&self) -> MutexGuard<'_, ModuleOptimizer> {
        self.moments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Equivalent gradient of a weight, as Adam's parameter in mode full.
#[derive(Module, Debug)]
struct Equivalent {
    direction: Param<Tensor<2>>,
}

/// A pair with its adjusted gradients.
struct Adjusted<'a> {
    met: PairGradients<'a>,
    grads: [Tensor<2>; 2],
}

impl<'a> Adjusted<'a> {
    fn of(mut met: PairGradients<'a>, delta: f64, x_mode: LoraProX) -> Result<Self, OptimError> {
        let device = met.a.device();
        let Some(grad_a) = met.grad_a.take() else { unreachable!("pairs come with both gradients") };
        let grad_b = met.grad_b.clone();
        let [a, b] = adjust(&met, [grad_a, grad_b], delta, x_mode)?;
        Ok(Self { met, grads: [tensor(a, &device), tensor(b, &device)] })
    }

    /// The gradients that follow from another gradient of the weight, `[d_in, d_out]` and negated.
    fn again(self, negated: Tensor<2>, delta: f64, x_mode: LoraProX) -> Result<Self, OptimError> {
        let PairGradients { pair, a, b, .. } = &self.met;
        let grad_a = negated.clone().times(b.clone().transpose()).mul_scalar(-pair.scale);
        let grad_b = a.clone().transpose().times(negated).mul_scalar(-pair.scale);
        let device = a.device();
        let [a, b] = adjust(&self.met, [grad_a, grad_b], delta, x_mode)?;
        Ok(Self { met: self.met, grads: [tensor(a, &device), tensor(b, &device)] })
    }
}

fn tensor(data: TensorData, device: &Device) -> Tensor<2> {
    Tensor::from_data(data, device)
}

/// The adjusted gradients, laid out as the factors.
fn adjust(
    met: &PairGradients<'_>,
    grads: [Tensor<2>; 2],
    delta: f64,
    x_mode: LoraProX,
) -> Result<[TensorData; 2], OptimError> {
    let path = &met.pair.path;
    let [a, b] = [transposed(met.a.clone()), transposed(met.b.clone())];
    let [grad_a, grad_b] = grads.map(transposed);
    let bad = |count| OptimError::NonFiniteGradient { path: path.clone(), count };
    let adjusted = closed_form([&a, &b], [&grad_a, &grad_b], met.pair.scale, delta, x_mode).ok_or_else(|| {
        let inputs = [&a, &b, &grad_a, &grad_b];
        bad(inputs.into_iter().flat_map(|x| x.iter()).filter(|value| !value.is_finite()).count() as u64)
    })?;
    let [a, b] = adjusted.map(|x| data(&x));
    Ok([a.map_err(bad)?, b.map_err(bad)?])
}

/// In the orientation of the paper: A is `r x d_in`, B is `d_out x r`, and so are their gradients. None when something is not finite.
///
/// Each of the four is read twice: once for the `r x r` products, once for the result.
fn closed_form(
    [a, b]: [&DMatrix<f64>; 2],
    [grad_a, grad_b]: [&DMatrix<f64>; 2],
    scale: f64,
    delta: f64,
    x_mode: LoraProX,
) -> Option<[DMatrix<f64>; 2]> {
    let over = (scale * scale).recip();
    let (a_transposed, b_transposed) = (a.transpose(), b.transpose());
    let (gram_a, gram_b) = (a * &a_transposed, &b_transposed * b);
    let (across_a, across_b) = (grad_a * a_transposed, b_transposed * grad_b);
    if across_a.iter().chain(across_b.iter()).any(|value| !value.is_finite()) {
        return None;
    }
    let (eigen_a, eigen_b) = (eigen(&gram_a)?, eigen(&gram_b)?);
    let q = damped_inverse(&eigen_a, delta) * over;
    if gram_b.iter().all(|value| *value == 0.0) {
        // The gradient of A is zero, but for rounding that the damped inverse would amplify.
        return Some([DMatrix::zeros(a.nrows(), a.ncols()), grad_b * q]);
    }
    let p = damped_inverse(&eigen_b, delta);
    let x = match x_mode {
        LoraProX::Zero => DMatrix::zeros(a.nrows(), a.nrows()),
        LoraProX::Symmetry => &p * &across_b * &gram_a * (-0.5 * over),
        LoraProX::Sylvester => {
            let (u, v) = (&eigen_b.eigenvectors, &eigen_a.eigenvectors);
            let mut x = u.transpose() * (&p * &across_a * -over) * v;
            // Components outside the range of both factors cannot be shared.
            let floor = f64::EPSILON * (eigen_a.eigenvalues.max() + eigen_b.eigenvalues.max());
            for (i, b) in eigen_b.eigenvalues.iter().enumerate() {
                for (j, a) in eigen_a.eigenvalues.iter().enumerate() {
                    x[(i, j)] = if a + b > floor { x[(i, j)] / (a + b) } else { 0.0 };
                }
            }
            u * x * v.transpose()
        }
    };
    let shared = &p * &across_b * &q + &x;
    Some([(&p * over) * grad_a + &x * a, grad_b * q - b * shared])
}

#[cfg(test)]
mod tests;
