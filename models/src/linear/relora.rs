//! Restarted low-rank updates of a dense weight ("ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695).

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use lowrank_optim::registry::{Built, Entry, Kind, OptionError, OptionList, Paper};
use lowrank_optim::{MomentReset, MomentResets, OptimError, ResetOrder};
use rand::SeedableRng;
use rand::rngs::StdRng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layer::{LinearLayer, NamedLayer, layer_of, plus_bias};
use super::parameterization::{LinearMethod, ParameterizationSpec, RestartPlan, ends_before_restart, rank_fits};
use super::steps::{LinearSteps, OptimizerRequest, RunFacts, StateChange};
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout, trained, uniform_values};

/// Options of ReLoRA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReLoraOptions {
    /// Width between the factors, at most the smaller side of a layer. A run that is given none takes a quarter of the
    /// model's width.
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// The product of the factors is scaled by alpha / rank.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub alpha: f64,
    /// Updates T from one restart to the next; restarts follow updates T + 1, 2 T + 1, ...
    #[schemars(range(min = 1))]
    pub reset_every: u64,
    /// Steps over which the learning rate comes back after a restart, fewer than reset_every.
    pub restart_warmup: u64,
    /// Effect of a restart on the factors' moments: zero; magnitude:Q keeps those above the Q-quantile; random:Q keeps each with chance 1 - Q.
    #[schemars(with = "String")]
    pub reset: MomentReset,
    /// Train a scale tanh(q) instead of alpha / rank.
    pub trained_scale: bool,
}

impl Default for ReLoraOptions {
    fn default() -> Self {
        Self {
            rank: 128,
            alpha: 32.0,
            reset_every: 5000,
            restart_warmup: 100,
            reset: MomentReset::Zero,
            trained_scale: false,
        }
    }
}

impl LinearMethod for ReLoraOptions {
    type Layer = ReLora;

    fn spec() -> &'static ParameterizationSpec {
        const SPEC: &ParameterizationSpec = &ParameterizationSpec {
            period: Some("reset_every"),
            starts_from_dense: true,
            ..ParameterizationSpec::plain(Entry {
                options: || OptionList::of(&ReLoraOptions::default()),
                papers: &[Paper { title: "ReLoRA: High-Rank Training Through Low-Rank Updates", place: "2307.05695" }],
                memory: "d_in d_out frozen, r (d_in + d_out) trained",
                ..Entry::plain(
                    Kind::Parameterization,
                    "relora",
                    "a frozen weight with two factors that are merged into it and re-initialised again and again",
                )
            })
        };
        SPEC
    }

    fn check(&self) -> Result<(), OptionError> {
        ends_before_restart(self.restart_warmup, self.reset_every)?;
        self.reset.validate().map_err(|error| {
            let reason = match error {
                OptimError::Option(OptionError::Value { reason, .. }) => reason,
                other => other.to_string(),
            };
            OptionError::value("reset", self.reset, reason)
        })
    }

    fn check_shape(&self, shape: [usize; 2]) -> Result<(), String> {
        rank_fits(self.rank, shape)
    }

    fn values(&self, [d_in, d_out]: [usize; 2]) -> usize {
        self.rank * (d_in + d_out) + usize::from(self.trained_scale)
    }

    fn kept(&self, _d_in: usize) -> usize {
        self.rank
    }

    /// The dense weight passes gradients on and has none.
    fn operations(&self, [d_in, d_out]: [usize; 2], rows: usize) -> [u64; 2] {
        let [dense, factors] = [d_in * d_out, self.rank * (d_in + d_out)].map(|values| 2 * (rows * values) as u64);
        [dense + factors, dense + 2 * factors]
    }

    fn restarts(&self) -> Option<RestartPlan> {
        Some(RestartPlan {
            every: self.reset_every,
            warmup_steps: self.restart_warmup,
            in_warmup: false,
            needs_zero_rate: true,
        })
    }

    fn steps(&self, run: RunFacts) -> Option<Box<dyn LinearSteps>> {
        Some(Box::new(Restarts { options: self.clone(), seed: run.seed, resets: MomentResets::default() }))
    }

    fn build(
        &self,
        builder: &mut Builder,
        path: &str,
        shape @ [d_in, d_out]: [usize; 2],
    ) -> Result<ReLora, ModelError> {
        let rank = self.rank;
        let name = |part: &str| format!("{path}.{part}");
        let weight = builder.matrix(&name("weight"), shape, Layout::Transposed, Init::Standard)?;
        let first = Init::Uniform(bound(d_in));
        Ok(ReLora {
            weight: weight.set_require_grad(false),
            a: builder.matrix(&name("a"), [d_in, rank], Layout::Transposed, first)?,
            b: builder.matrix(&name("b"), [rank, d_out], Layout::Transposed, Init::Constant(0.0))?,
            scaling: match self.trained_scale {
                true => Some(builder.vector(&name("scaling"), 1, Init::Constant(1.0))?),
                false => None,
            },
            bias: None,
            scale: self.alpha / rank as f64,
        })
    }
}

impl ReLoraOptions {
    /// The number of the restart that follows this update, counted from 1.
    pub fn restart_after(&self, step: u64) -> Option<u64> {
        let every = self.reset_every;
        (step > every && (step - 1).is_multiple_of(every)).then(|| (step - 1) / every)
    }
}

/// Restarts of all layers of a model.
#[derive(Debug)]
struct Restarts {
    options: ReLoraOptions,
    seed: u64,
    resets: MomentResets,
}

impl LinearSteps for Restarts {
    fn optimizer(&self, request: &OptimizerRequest) -> Result<Built, OptimError> {
        let OptimizerRequest { method, options, parameters, meter, .. } = request;
        method.init_resettable(options, parameters, meter, &self.resets)
    }

    fn end_step(&self, step: u64, layers: Vec<NamedLayer>) -> StateChange {
        let Some(number) = self.options.restart_after(step) else { return StateChange::None };
        let mut parameters = Vec::new();
        for layer in layers.into_iter().filter_map(|(_, layer)| layer_of::<ReLora>(layer)) {
            layer.restart(layer.fresh(self.seed, number));
            parameters.extend([layer.a.id, layer.b.id]);
        }
        let reset = ResetOrder { reset: self.options.reset, seed: self.seed, number };
        StateChange::Reset { handle: self.resets.clone(), reset, parameters }
    }
}

/// `y = x W + s (x A) B`, where `W` has no gradient. A restart adds the product to `W` and re-initialises the factors, so that many updates of low rank
/// make one of high rank.
#[derive(Module, Debug)]
pub struct ReLora {
    /// Weight `[d_in, d_out]`, changed by restarts alone.
    pub weight: Param<Tensor<2>>,
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`, zero after a restart.
    pub b: Param<Tensor<2>>,
    /// `q` of a scale `tanh(q)` that is trained; none for a fixed `alpha / rank`.
    pub scaling: Option<Param<Tensor<1>>>,
    /// Bias `[d_out]`; none in families without.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    scale: f64,
}

impl ReLora {
    /// A layer of given parts, on an autodiff device.
    pub fn from_parts(weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, alpha: f64) -> Self {
        let scale = alpha / a.dims()[1] as f64;
        Self {
            weight: Param::from_tensor(weight).set_require_grad(false),
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            scaling: None,
            bias: None,
            scale,
        }
    }

    /// The weight plus the scaled product, without gradient.
    fn merged(&self) -> Tensor<2> {
        let a = self.a.val().inner();
        let a = match &self.scaling {
            Some(q) => a * q.val().inner().tanh().unsqueeze::<2>(),
            None => a.mul_scalar(self.scale),
        };
        self.weight.val().inner() + a.matmul(self.b.val().inner())
    }

    /// Adds the product to the weight and restarts with this first factor `[d_in, rank]` and a second one of zeros. A trained scale stays as it
    /// is: at 0, with a second factor of zeros, nothing would ever get a gradient.
    pub fn restart(&mut self, a: Tensor<2>) {
        let b = self.b.val().inner().zeros_like();
        self.weight = Param::initialized(self.weight.id, Tensor::from_inner(self.merged())).set_require_grad(false);
        self.a = trained(self.a.id, a);
        self.b = trained(self.b.id, b);
    }

    /// The first factor after restart `number`: drawn as at the start from seed, layer and number.
    pub fn fresh(&self, seed: u64, number: u64) -> Tensor<2> {
        let a = self.a.val().inner();
        let [d_in, rank] = a.dims();
        let mut random = StdRng::seed_from_u64(seed ^ self.a.id.val() ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let values = uniform_values(&mut random, d_in * rank, bound(d_in));
        Tensor::from_data(TensorData::new(values, [d_in, rank]), &a.device())
    }
}

impl LinearLayer for ReLora {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let (a, scale) = match &self.scaling {
            // On the small factor, so that the gradient of the scale is a sum over it.
            Some(q) => (self.a.val() * q.val().tanh().unsqueeze::<2>(), 1.0),
            None => (self.a.val(), self.scale),
        };
        plus_bias(ops::low_rank_linear(x, self.weight.val(), a, self.b.val(), scale), &self.bias)
    }

    fn to_dense(&self) -> Option<Tensor<2>> {
        Some(self.merged())
    }

    fn bias_mut(&mut self) -> &mut Option<Param<Tensor<1>>> {
        &mut self.bias
    }
}

fn bound(d_in: usize) -> f64 {
    (d_in as f64).sqrt().recip()
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::{Llama, LlamaConfig, Parameterization};
    use burn::tensor::Device;
    use lowrank_optim::thin_svd;

    fn draw(shape: [usize; 2], seed: u64) -> Tensor<2> {
        let values = uniform_values(&mut StdRng::seed_from_u64(seed), shape[0] * shape[1], 1.0);
        Tensor::from_data(TensorData::new(values, shape), &Device::default()).autodiff()
    }

    fn layer([d_in, d_out]: [usize; 2], rank: usize) -> ReLora {
        let parts = [draw([d_in, d_out], 1), draw([d_in, rank], 2), draw([rank, d_out], 3)];
        let [weight, a, b] = parts.map(Tensor::require_grad);
        ReLora::from_parts(weight, a, b, 1.5 * rank as f64)
    }

    #[test]
    fn a_restart_leaves_the_outputs_and_zeroes_the_second_factor() {
        for trained_scale in [false, true] {
            let mut layer = layer([9, 7], 3);
            layer.scaling =
                trained_scale.then(|| Param::from_tensor(Tensor::full([1], 0.7, &Device::default()).autodiff()));
            let x = draw([5, 9], 4);
            let (before, dense) = (layer.forward(x.clone()).inner(), layer.merged());
            let (a, ids) = (layer.a.val().inner(), [layer.a.id, layer.b.id, layer.weight.id]);
            layer.restart(layer.fresh(7, 1));
            let far = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
            assert!(far(layer.merged(), dense) <= 1e-6);
            assert!(far(layer.forward(x).inner(), before) <= 1e-5);
            assert_eq!(layer.b.val().abs().max().into_scalar::<f32>(), 0.0);
            assert!(far(layer.a.val().inner(), a) > 0.1, "the first factor is another one");
            assert!(layer.a.val().abs().max().into_scalar::<f32>() <= 1.0 / 3.0);
            assert_eq!([layer.a.id, layer.b.id, layer.weight.id], ids);
            assert!(layer.a.is_require_grad() && layer.b.is_require_grad() && !layer.weight.is_require_grad());
        }
    }

    #[test]
    fn fresh_factors_follow_from_seed_layer_and_number() {
        let layer = layer([9, 7], 3);
        let values = |seed, number| layer.fresh(seed, number).into_data();
        assert_eq!(values(1, 2), values(1, 2));
        assert!(values(1, 2) != values(2, 2) && values(1, 2) != values(1, 3));
    }

    #[test]
    fn each_cycle_adds_its_rank_until_all_of_it() {
        let mut layer = layer([8, 10], 3);
        let start = layer.weight.val().inner();
        for cycle in 1..=4 {
            // Stands for trained factors.
            layer.a = trained(layer.a.id, draw([8, 3], 10 + cycle).inner());
            layer.b = trained(layer.b.id, draw([3, 10], 20 + cycle).inner());
            layer.restart(layer.fresh(1, cycle));
            let change = layer.weight.val().inner() - start.clone();
            let singular = thin_svd(&change, 8).values;
            let rank = singular.iter().filter(|value| **value > 1e-4 * singular[0]).count();
            assert_eq!(rank, (3 * cycle as usize).min(8), "after {cycle} cycles: {singular:?}");
        }
    }

    #[test]
    fn the_frozen_weight_gets_no_gradient() {
        let layer = layer([6, 5], 2);
        let mut grads = layer.forward(draw([3, 6], 1)).square().sum().backward();
        assert!(layer.weight.val().grad_remove(&mut grads).is_none());
        assert!(layer.a.val().grad_remove(&mut grads).is_some() && layer.b.val().grad_remove(&mut grads).is_some());
    }

    #[test]
    fn a_restart_of_the_model_keeps_its_loss_and_names_the_factors() {
        let config = LlamaConfig {
            hidden_size: 16,
            intermediate_size: 24,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 8,
            num_hidden_layers: 2,
            parameterization: Parameterization::ReLora(ReLoraOptions { rank: 4, alpha: 8.0, ..Default::default() }),
            ..LlamaConfig::named("llama-9m", 40).unwrap()
        };
        let mut model = Llama::random(&config, 3, &Device::default().autodiff()).unwrap();
        for (_, layer) in model.linears_mut() {
            let layer = layer_of::<ReLora>(layer).unwrap();
            layer.b = trained(layer.b.id, draw(layer.b.dims(), 5).inner().mul_scalar(0.1));
        }
        let ids = crate::ids_tensor(&(0..24).collect::<Vec<i32>>(), 2, &Device::default());
        let loss = |model: &Llama| model.loss_sum(ids.clone(), ids.clone(), None).into_scalar::<f32>() / 24.0;
        let before = loss(&model);
        let options = ReLoraOptions { reset_every: 5, ..Default::default() };
        let steps = options.steps(RunFacts { seed: 9, width: 16 }).unwrap();
        let StateChange::Reset { reset, parameters, .. } = steps.end_step(6, model.linears_mut()) else {
            panic!("update 6 is the first one of the second cycle")
        };
        assert_eq!((reset.number, parameters.len()), (1, 2 * 2 * 7));
        assert!((loss(&model) - before).abs() <= 1e-5, "{before} and {}", loss(&model));
    }

    #[test]
    fn restarts_follow_the_updates_after_each_period() {
        let after = |reset_every, step| ReLoraOptions { reset_every, ..Default::default() }.restart_after(step);
        let found: Vec<_> = (0..=21).filter_map(|step| Some((step, after(5, step)?))).collect();
        assert_eq!(found, [(6, 1), (11, 2), (16, 3), (21, 4)]);
        assert_eq!((1..4).map(|step| after(1, step)).collect::<Vec<_>>(), [None, Some(1), Some(2)]);
    }
}
