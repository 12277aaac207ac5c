//! Trained scalings of one random pair ("VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454): all layers share the pair, each trains
//! two vectors.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Shared, SharedBytes, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use lowrank_kernels::ops::linear;
use lowrank_kernels::random::uniform_values;

/// `y = x W + b + ((x A) diag(d) B) diag(b)`: the pair is frozen, the diagonals are trained. Further adapters of a model share the pair.
#[derive(Module, Debug)]
pub struct Vera {
    /// Scalings between the pair `[rank]`.
    pub lambda_d: Param<Tensor<1>>,
    /// Scalings of the outputs `[d_out]`, zero at the start.
    pub lambda_b: Param<Tensor<1>>,
    /// Matrix `[largest d_in, rank]`; a layer uses the leading rows.
    #[module(skip)]
    a: Shared<2>,
    /// Matrix `[rank, largest d_out]`; a layer uses the leading columns.
    #[module(skip)]
    b: Shared<2>,
    #[module(skip)]
    d_in: usize,
}

/// Options of [`Vera`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct VeraOptions {
    /// Initial value of the scalings between the pair, not 0; small is best.
    pub d_initial: f64,
}

impl Default for VeraOptions {
    fn default() -> Self {
        Self { d_initial: 0.1 }
    }
}

impl Vera {
    /// Part of the pair used by this layer, `[d_in, rank]` and `[rank, d_out]`.
    fn pair(&self) -> [Tensor<2>; 2] {
        let d_out = self.lambda_b.dims()[0];
        [self.a.val().narrow(0, 0, self.d_in), self.b.val().narrow(1, 0, d_out)]
    }
}

impl Structure for Vera {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let [a, b] = self.pair();
        base.plus(input, |x| {
            linear(linear(x, a) * self.lambda_d.val().unsqueeze(), b) * self.lambda_b.val().unsqueeze()
        })
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        let [a, b] = self.pair();
        Some((a * self.lambda_d.val().unsqueeze()).matmul(b) * self.lambda_b.val().unsqueeze())
    }

    fn shared(&self) -> Vec<SharedBytes> {
        vec![self.a.bytes(), self.b.bytes()]
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        let [a, b] = self.pair();
        Some([a * self.lambda_d.val().unsqueeze(), b * self.lambda_b.val().unsqueeze()])
    }
}

impl Method for Vera {
    type Options = VeraOptions;

    const LR: f64 = 4e-3;

    const SPEC: Spec = Spec {
        name: "vera",
        title: "VeRA: Vector-based Random Matrix Adaptation",
        arxiv: "2310.11454",
        summary: "scales one random pair that all layers share",
        trains: "r + d_out",
        stores: "r (largest d_in + largest d_out), once for all layers",
        dense_forward: false,
        rank: Rank::Fixed(256),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "lambda_d", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "lambda_b", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "vera_a", role: TensorRole::Frozen, transposed: true },
            TensorSpec { name: "vera_b", role: TensorRole::Frozen, transposed: true },
        ],
    };

    fn check(options: &VeraOptions, _place: &Place) -> Result<(), String> {
        match options.d_initial {
            start if start == 0.0 || !start.is_finite() => {
                Err(format!("d_initial = {start}: with outputs scaled by 0 too, nothing could be trained"))
            }
            _ => Ok(()),
        }
    }

    fn build(options: &VeraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        // An existing pair may be larger.
        let [largest_in, largest_out] = site.place.largest;
        let reach = |key: &str, axis: usize| site.shared_made(key).map_or(0, |shape| shape[axis]);
        let (most_in, most_out) = (largest_in.max(reach("vera_a", 0)), largest_out.max(reach("vera_b", 1)));
        let draw = |what: &'static str, fan: usize, count: usize| {
            move |site: &mut Site<'_>| {
                Ok(uniform_values(&mut site.common_random(what), count, (6.0 / fan as f64).sqrt()))
            }
        };
        Ok(Self {
            lambda_d: site.trained("lambda_d", [rank], |_| Ok(vec![options.d_initial as f32; rank]))?,
            lambda_b: site.trained("lambda_b", [d_out], |_| Ok(vec![0.0; d_out]))?,
            a: site.shared("vera_a", "vera_a", [most_in, rank], draw("vera_a", most_in, most_in * rank))?,
            b: site.shared("vera_b", "vera_b", [rank, most_out], draw("vera_b", rank, rank * most_out))?,
            d_in,
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::{BackendTensor, DispatchTensorKind};
    use burn::optim::SgdConfig;
    use burn::tensor::Device;

    use super::*;
    use crate::bench::Dense;
    use crate::bench::{Bench, near};
    use crate::{AdapterConfig, Attach, Targets, each_adapter};
    use lowrank_kernels::host::values as host;

    #[derive(Module, Debug)]
    struct Two {
        one: Dense,
        two: Dense,
    }

    fn address(shared: &Shared<2>) -> *const f32 {
        match shared.val().into_dispatch().kind {
            DispatchTensorKind::Flex(BackendTensor::Float(tensor)) => tensor.storage::<f32>().as_ptr(),
            _ => unreachable!(),
        }
    }

    #[test]
    fn layers_use_the_leading_parts_of_one_pair_in_memory() {
        let zeros = |shape: [usize; 2]| Dense::from_parts(Tensor::zeros(shape, &Device::default()).autodiff(), None);
        let two = Two { one: zeros([9, 4]), two: zeros([5, 7]) };
        let attach = Attach::new(AdapterConfig::new("vera").with_rank(3));
        let (two, report) = attach.factored().to(two).unwrap();
        let mut found = Vec::new();
        each_adapter(&two, |_, adapter| found.extend(adapter.stack.clone()));
        let found: Vec<Vera> =
            found.into_iter().map(|attached| attached.structure.downcast_ref::<Vera>().unwrap().clone()).collect();
        for [one, two] in [[&found[0].a, &found[1].a], [&found[0].b, &found[1].b]] {
            assert_eq!(address(one), address(two));
        }
        assert_eq!(report.frozen_bytes(), 4 * 3 * (9 + 7));
        let [a, b] = found[1].pair();
        assert_eq!(host(a), host(found[0].a.val().narrow(0, 0, 5)));
        assert_eq!(host(b), host(found[0].b.val().narrow(1, 0, 7)));
        // A second adapter shares the pair or is rejected.
        let second = |seed: u64, rank: usize, names: &str| {
            let config = AdapterConfig::new("vera").with_rank(rank).with_targets(Targets::parse(names));
            let config = AdapterConfig { name: "second".into(), seed, ..config };
            Attach::new(config).factored().to(two.clone()).map(|(two, _)| two).map_err(|error| error.to_string())
        };
        let both = second(0, 3, "two").unwrap();
        let mut stacked = Vec::new();
        each_adapter(&both, |_, adapter| stacked.extend(adapter.stack.get(1).cloned()));
        let Some(again) = stacked[0].structure.downcast_ref::<Vera>() else { unreachable!() };
        assert_eq!(address(&again.a), address(&found[0].a));
        let error = second(7, 3, "two").unwrap_err();
        assert!(error.contains("seed = 7") && error.contains("the seed 0"), "{error}");
        let error = second(0, 4, "two").unwrap_err();
        assert!(error.contains("[9, 4]") && error.contains("[9, 3]"), "{error}");
        let config = AdapterConfig::new("vera").with_option("d_initial", 0.0);
        let error = Attach::new(AdapterConfig { name: "dead".into(), ..config }).to(two).unwrap_err();
        assert!(error.to_string().contains("nothing could be trained"), "{error}");
    }

    fn bench() -> Bench {
        Bench::new(6, 5, false).with(&AdapterConfig::new("vera").with_rank(4))
    }

    #[test]
    fn the_first_step_moves_the_outputs_alone() {
        let (bench, _) = bench().steps(SgdConfig::new().init(), 1e-2, 1);
        assert!(bench.values("lambda_d").iter().all(|value| *value == 0.1));
        assert!(bench.values("lambda_b").iter().all(|value| *value != 0.0));
    }

    #[test]
    fn even_scalings_give_lora_with_a_fixed_pair() {
        let attached = bench().adapter();
        let Some(vera) = attached.structure.downcast_ref::<Vera>() else { unreachable!() };
        let even = Vera {
            lambda_d: Param::from_tensor(Tensor::ones([4], &Device::default())),
            lambda_b: Param::from_tensor(Tensor::full([5], 0.5, &Device::default())),
            ..vera.clone()
        };
        let [a, b] = vera.pair();
        near(even.delta_weight(&bench().weight()).unwrap(), a.matmul(b).mul_scalar(0.5), 1e-6);
    }
}
