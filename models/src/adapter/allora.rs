//! ALLoRA as an adapter ("ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692): LoRA without scale and dropout,
//! whose factors learn from each output at a pace that falls as its part of the update grows.

use std::collections::BTreeMap;

use burn::module::{
    LoraAdapter, Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization, Reparameterizer,
};
use burn::tensor::{DType, Tensor};
use lowrank_optim::key_of;
use lowrank_optim::rules::{LoraPair, NormOf, check_eta, output_paces};
use serde::{Deserialize, Serialize};

use super::base::{Base, Input};
use super::config::{AdapterConfig, Scaling};
use super::control::Control;
use super::error::AdapterError;
use super::init;
use super::registry::AnyStructure;
use super::site::{Place, Site};
use super::stack::{Adapter, Attached};
use super::structure::{Alpha, Method, Rank, Spec, Structure, TensorRole, TensorSpec};

/// `y = x W + (x A) B`. Gradients of A and B see the gradient of the output times [`output_paces`]; all others see it as it is.
#[derive(Module, Debug)]
pub struct Allora {
    /// The factor at the input `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// The factor at the output `[rank, d_out]`, zero at the start.
    pub b: Param<Tensor<2>>,
    #[module(skip)]
    options: AlloraOptions,
}

/// Options of [`Allora`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct AlloraOptions {
    /// Pace of an output whose update is zero.
    pub eta: f64,
    /// Whose norm the pace falls with.
    pub norm_of: NormOf,
}

impl Default for AlloraOptions {
    fn default() -> Self {
        Self { eta: 4.0, norm_of: NormOf::BaRow }
    }
}

impl Allora {
    /// The pace `[d_out]` of each output at the present values, without gradient.
    pub fn paces(&self) -> Tensor<1> {
        output_paces(self.a.val(), self.b.val(), self.options.eta, self.options.norm_of)
    }
}

impl Structure for Allora {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let (a, b) = (self.a.val(), self.b.val());
        match a.device().is_autodiff() {
            true => base.plus_paced_product(input, a, b, self.paces()),
            false => base.plus_product(input, a, b, 1.0),
        }
    }

    fn update(&self, _weight: &Tensor<2>) -> Tensor<2> {
        let product = self.a.val().matmul(self.b.val());
        let learns = product.clone() * self.paces().unsqueeze::<2>();
        // The product, with gradients that see the pace.
        product.detach() + (learns.clone() - learns.detach())
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        Some([self.a.val(), self.b.val()])
    }
}

impl Method for Allora {
    type Options = AlloraOptions;

    const SPEC: Spec = Spec {
        name: "allora",
        title: "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
        arxiv: "2410.09692",
        trains: "r (d_in + d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &["gaussian", "random", "orthogonal"],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        peft_type: "LORA",
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, turned: true },
            TensorSpec { name: "b", role: TensorRole::B, turned: true },
        ],
        options: &[
            ("eta", "pace of an output whose update is zero, greater than 0 and at most 1e9"),
            ("norm_of", "whose norm the pace falls with: ba_row (the output's part of the product), b_row (of B)"),
        ],
    };

    fn check(options: &AlloraOptions, place: &Place) -> Result<(), String> {
        check_eta(options.eta).map_err(|error| error.to_string())?;
        init::check(place)
    }

    fn build(options: &AlloraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let start = init::Factors::of(site)?;
        Ok(Self {
            a: site.trained("a", [d_in, rank], |_| Ok(start.a))?,
            b: site.trained("b", [rank, d_out], |_| Ok(start.b))?,
            options: *options,
        })
    }
}

impl Allora {
    /// Turns the adapters that Burn's [`Module::apply_lora`] attached into ALLoRA; layers that compose their weight get its exact gradients too. A
    /// scale of Burn's adapter becomes part of B, so that the module gives what it gave; with B at zero nothing is left of it.
    ///
    /// ```no_run
    /// # use burn::module::{Lora, Module};
    /// # use lowrank_models::adapter::{AdapterError, Allora, AlloraOptions};
    /// # fn example<M: Module>(model: M) -> Result<M, AdapterError> {
    /// Allora::convert(model.apply_lora(Lora::new(8, 8.0)), AlloraOptions::default())
    /// # }
    /// ```
    pub fn convert<M: Module>(module: M, options: AlloraOptions) -> Result<M, AdapterError> {
        let refuse = |reason: String| AdapterError::Refused(reason);
        check_eta(options.eta).map_err(|error| refuse(error.to_string()))?;
        let pairs = LoraPair::of(&module).map_err(|error| refuse(error.to_string()))?;
        let mut taken = Take { pairs: &pairs, other: None, factors: BTreeMap::new() };
        module.visit(&mut taken);
        if let Some(name) = taken.other {
            return Err(refuse(format!(
                "the module has adapters of another kind too ({name}): merge or remove them first"
            )));
        }
        let factors = taken.factors;
        let control = Control::new(AdapterConfig::new("allora"));
        // With B at zero Burn's adapters add nothing to the weights that stay.
        let module = module.map(&mut Empty(&pairs)).materialize();
        Ok(module.apply_reparameterization(Convert { pairs: &pairs, factors, options, control }))
    }
}

/// Takes factors out of Burn's adapters.
struct Take<'a> {
    pairs: &'a [LoraPair],
    other: Option<String>,
    factors: BTreeMap<ParamId, Param<Tensor<2>>>,
}

impl ModuleVisitor for Take<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == "Reparameterization" && name != LoraAdapter::NAME {
            self.other = Some(name.to_string());
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(pair) = self.pairs.iter().find(|pair| pair.a == param.id || pair.b == param.id) else { return };
        let &[rows, columns] = param.lazy_shape().as_slice() else { return };
        let value = param.val();
        let (tracked, trained) = (value.device().is_autodiff(), value.is_require_grad());
        let plain = value.without_autodiff().cast(DType::F32).reshape([rows, columns]);
        let plain = if pair.b == param.id { plain.mul_scalar(pair.scale) } else { plain };
        let value = if tracked { Tensor::from_inner(plain) } else { plain };
        let value = if trained { value.require_grad() } else { value };
        self.factors.insert(param.id, Param::initialized(param.id, value));
    }
}

struct Empty<'a>(&'a [LoraPair]);

impl ModuleMapper for Empty<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.iter().any(|pair| pair.b == param.id) {
            true => Param::initialized(param.id, param.val().zeros_like()),
            false => param,
        }
    }
}

struct Convert<'a> {
    pairs: &'a [LoraPair],
    factors: BTreeMap<ParamId, Param<Tensor<2>>>,
    options: AlloraOptions,
    control: Control,
}

impl Reparameterizer for Convert<'_> {
    type Reparam = Adapter;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Adapter>) {
        let Some(pair) = self.pairs.iter().find(|pair| pair.weight == param.id) else { return (param, None) };
        let (Some(a), Some(b)) = (self.factors.remove(&pair.a), self.factors.remove(&pair.b)) else {
            return (param, None);
        };
        let structure = AnyStructure::Allora(Allora { a, b, options: self.options });
        let attached = Attached { structure, origin: None, control: self.control.clone(), layer: key_of(&pair.path) };
        (param, Some(Adapter { stack: vec![attached] }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dense;
    use crate::adapter::{AdapterConfig, Attach, Rule, each_adapter};
    use crate::weights::{host, normal_values};
    use burn::module::Lora;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{GradientsParams, SgdConfig};
    use burn::tensor::{Device, TensorData};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[derive(Module, Debug)]
    struct Bench {
        layer: Dense,
    }

    fn values<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        let count = shape.iter().product();
        let values = normal_values(&mut StdRng::seed_from_u64(seed), count, 1.0);
        Tensor::from_data(TensorData::new(values, shape), &Device::default().autodiff())
    }

    fn bench(config: AdapterConfig) -> Bench {
        let layer = Dense::from_parts(values([6, 5], 1), Some(values([5], 2)));
        Attach::new(config).factored().to(Bench { layer }).unwrap().0
    }

    fn allora(eta: f64, init: &str) -> AdapterConfig {
        let config = AdapterConfig { init: init.into(), ..AdapterConfig::new("lora").with_rank(3) };
        Rule::Allora { eta, norm_of: NormOf::BaRow }.prepare(config).unwrap()
    }

    fn lora(init: &str) -> AdapterConfig {
        AdapterConfig { init: init.into(), ..AdapterConfig::new("lora").with_rank(3).with_alpha(3.0) }
    }

    fn factors(bench: &Bench) -> [(ParamId, Tensor<2>); 2] {
        let mut found = None;
        each_adapter(bench, |_, adapter| {
            let Some(attached) = adapter.stack.last() else { return };
            let [a, b] = attached.structure().as_factors().unwrap();
            let ids: Vec<ParamId> = attached.shapes().iter().map(|tensor| tensor.id).collect();
            found = Some([(ids[0], a.inner()), (ids[1], b.inner())]);
        });
        found.unwrap()
    }

    fn slopes(bench: &Bench) -> [Vec<f32>; 2] {
        let loss = bench.layer.forward(values([4, 6], 3)).square().mean();
        let mut grads = GradientsParams::from_grads(loss.backward(), bench);
        factors(bench).map(|(id, _)| host(grads.remove::<2>(id).unwrap()))
    }

    fn near(ours: &[f32], expected: &[f32], share: f32) {
        let largest = expected.iter().fold(1e-20f32, |largest, value| largest.max(value.abs()));
        for (ours, expected) in ours.iter().zip(expected) {
            assert!((ours - expected).abs() <= share * largest, "{ours} instead of {expected} (largest {largest})");
        }
    }

    #[test]
    fn the_output_does_not_depend_on_eta_and_starts_at_the_base() {
        let x = || values([4, 6], 3);
        let base = host(Dense::from_parts(values([6, 5], 1), Some(values([5], 2))).forward(x()));
        assert_eq!(host(bench(allora(4.0, "default")).layer.forward(x())), base);
        let expected = host(bench(lora("random")).layer.forward(x()));
        for eta in [0.01, 1.0, 16.0] {
            let ours = bench(allora(eta, "random"));
            assert_eq!(host(ours.layer.forward(x())), expected);
            near(&host(ours.valid().materialize().layer.forward(x().inner())), &expected, 1e-5);
        }
    }

    #[test]
    fn a_small_eta_is_a_factor_of_the_gradients() {
        let plain = slopes(&bench(lora("random")));
        for (ours, plain) in slopes(&bench(allora(1e-3, "random"))).iter().zip(&plain) {
            near(ours, &plain.iter().map(|value| value * 1e-3).collect::<Vec<f32>>(), 1e-5);
        }
    }

    #[test]
    fn from_zero_one_step_moves_b_eta_times_as_far() {
        let step = |config: AdapterConfig| {
            let bench = bench(config);
            let loss = bench.layer.forward(values([4, 6], 3)).square().mean();
            let grads = GradientsParams::from_grads(loss.backward(), &bench);
            let bench = SgdConfig::new().init().step(0.1, bench, grads);
            factors(&bench).map(|(_, value)| host(value))
        };
        let [plain_a, plain_b] = step(lora("default"));
        for eta in [1.0, 4.0] {
            let [a, b] = step(allora(eta, "default"));
            assert_eq!(a, plain_a);
            near(&b, &plain_b.iter().map(|value| value * eta as f32).collect::<Vec<f32>>(), 1e-6);
        }
    }

    #[test]
    fn on_top_of_another_adapter_the_gradients_are_the_same() {
        let alone = bench(allora(2.0, "random"));
        let first = bench(AdapterConfig { name: "first".into(), ..lora("default") });
        let stacked = Attach::new(allora(2.0, "random")).factored().to(first).unwrap().0;
        for (ours, expected) in slopes(&stacked).iter().zip(slopes(&alone)) {
            near(ours, &expected, 1e-5);
        }
    }

    #[derive(Module, Debug)]
    struct Burns {
        first: Linear,
        second: Linear,
    }

    #[test]
    fn burns_adapters_become_allora_with_its_gradients() {
        let device = Device::default().autodiff();
        let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).init(&device);
        let plain = Burns { first: layer(6, 5), second: layer(5, 4) }.apply_lora(Lora::new(2, 4.0));
        let forward = |module: &Burns| module.second.forward(module.first.forward(values([7, 6], 4)).tanh());
        let base = host(forward(&plain));
        let mut module = Allora::convert(plain.clone(), AlloraOptions { eta: 4.0, norm_of: NormOf::BaRow }).unwrap();
        assert_eq!(host(forward(&module)), base);
        assert_eq!(host(module.first.weight.base()), host(plain.first.weight.base()));
        let mut optimizer = SgdConfig::new().init();
        for _ in 0..3 {
            let grads = GradientsParams::from_grads(forward(&module).square().sum().backward(), &module);
            assert_eq!(grads.len(), 4, "those of the factors alone");
            module = optimizer.step(0.01, module, grads);
        }
        let moved = host(forward(&module));
        assert_ne!(moved, base);

        // gA = (G * pace) B', gB = A' (G * pace) with the gradient G of the whole weight.
        let mut grads = forward(&module).square().sum().backward();
        let whole = module.clone().valid().materialize().train();
        let whole = Burns { first: whole.first.set_require_grad(true), second: whole.second.set_require_grad(true) };
        let mut expected = forward(&whole).square().sum().backward();
        let adapter = |linear: &Linear| match &linear.weight.reparameterization::<Adapter>().unwrap().stack[0].structure
        {
            AnyStructure::Allora(allora) => allora.clone(),
            other => panic!("{} instead of allora", other.spec().name),
        };
        for (ours, whole) in [(&module.first, &whole.first), (&module.second, &whole.second)] {
            let allora = adapter(ours);
            let gradient = whole.weight.val().grad_remove(&mut expected).unwrap() * allora.paces().inner().unsqueeze();
            let [a, b] = [allora.a.val(), allora.b.val()];
            let expected_a = gradient.clone().matmul(b.clone().inner().transpose());
            let expected_b = a.clone().inner().transpose().matmul(gradient);
            near(&host(a.grad_remove(&mut grads).unwrap()), &host(expected_a), 1e-5);
            near(&host(b.grad_remove(&mut grads).unwrap()), &host(expected_b), 1e-5);
        }
        assert!(Allora::convert(module, AlloraOptions::default()).is_err(), "there is no adapter of Burn any more");
    }

    #[test]
    fn a_scale_of_burns_adapter_becomes_part_of_b() {
        let device = Device::default().autodiff();
        let module = LinearConfig::new(6, 5).init(&device).apply_lora(Lora::new(2, 5.0));
        let x = || values([7, 6], 4);
        let grads = GradientsParams::from_grads(module.forward(x()).square().sum().backward(), &module);
        let module = SgdConfig::new().init().step(0.01, module, grads);
        let expected = host(module.forward(x()));
        near(&host(Allora::convert(module, AlloraOptions::default()).unwrap().forward(x())), &expected, 1e-6);
    }
}
