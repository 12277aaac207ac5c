//! ALLoRA as an adapter ("ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692): LoRA without
//! scale and dropout, whose learning rate for each output falls as its part of the update grows.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_optim::rules::{NormOf, output_lr_scales};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};
use crate::init::factors as init;

/// `y = x W + (x A) B`. A and B use the gradient of the output times [`output_lr_scales`]; all other tensors use the
/// plain gradient.
#[derive(Module, Debug)]
pub struct Allora {
    /// Factor at the input `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Factor at the output `[rank, d_out]`, zero at the start.
    pub b: Param<Tensor<2>>,
    #[module(skip)]
    pub(super) options: AlloraOptions,
}

/// Options of [`Allora`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
pub struct AlloraOptions {
    /// Learning-rate factor of an output whose update is zero.
    #[schemars(range(max = 1e9), extend("exclusiveMinimum" = 0.0))]
    pub eta: f64,
    /// Norm that the factor falls with.
    pub norm_of: NormOf,
}

impl Default for AlloraOptions {
    fn default() -> Self {
        Self { eta: 4.0, norm_of: NormOf::BaRow }
    }
}

impl Allora {
    /// Learning-rate scale `[d_out]` of each output at the current values, without gradient.
    pub fn paces(&self) -> Tensor<1> {
        output_lr_scales(self.a.val(), self.b.val(), self.options.eta, self.options.norm_of)
    }
}

impl Structure for Allora {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let (a, b) = (self.a.val(), self.b.val());
        match a.device().is_autodiff() {
            true => base.plus_lr_scaled_product(input, a, b, self.paces()),
            false => base.plus_product(input, a, b, 1.0),
        }
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        let product = self.a.val().matmul(self.b.val());
        let learns = product.clone() * self.paces().unsqueeze::<2>();
        // The product, with gradients multiplied by the learning-rate scale.
        Some(product.detach() + (learns.clone() - learns.detach()))
    }

    fn factors(&self) -> Option<Factors> {
        Some(Factors { a: self.a.val(), b: self.b.val(), scale: 1.0 })
    }
}

impl Method for Allora {
    type Options = AlloraOptions;

    const SPEC: Spec = Spec {
        name: "allora",
        title: "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
        arxiv: "2410.09692",
        summary: "LoRA without scale and dropout; outputs learn more slowly as their part of the update grows",
        trains: "r (d_in + d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: init::BESIDE_THE_WEIGHT,
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    fn check(_options: &AlloraOptions, place: &Place) -> Result<(), String> {
        init::check(place)
    }

    fn build(options: &AlloraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let start = init::start(site)?;
        Ok(Self {
            a: site.trained("a", [d_in, rank], |_| Ok(start.a))?,
            b: site.trained("b", [rank, d_out], |_| Ok(start.b))?,
            options: *options,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Dense;
    use crate::{AdapterConfig, AlloraRule, Attach, Rule, each_adapter};
    use burn::module::ParamId;
    use burn::optim::{GradientsParams, SgdConfig};
    use burn::tensor::{Device, TensorData};
    use lowrank_kernels::host::values as host;
    use lowrank_kernels::random::normal_values;
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
        AlloraRule { eta, norm_of: NormOf::BaRow }.prepare(config).unwrap()
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

    fn gradients(bench: &Bench) -> [Vec<f32>; 2] {
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
        let plain = gradients(&bench(lora("random")));
        for (ours, plain) in gradients(&bench(allora(1e-3, "random"))).iter().zip(&plain) {
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
        for (ours, expected) in gradients(&stacked).iter().zip(gradients(&alone)) {
            near(ours, &expected, 1e-5);
        }
    }
}
