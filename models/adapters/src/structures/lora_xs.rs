//! A trained square matrix between two frozen factors ("LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
//! Parameters", arXiv 2405.17604), and the initialisation `lora-sb`, which approximates the first step of full
//! fine-tuning ("Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
//! Fine-Tuning", arXiv 2411.19557).

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use lowrank_optim::registry::Paper;
use lowrank_optim::thin_svd;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::initialisation::Initialisation;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::MatrixProduct;

/// Initialisation LoRA-SB.
const LORA_SB: Initialisation = Initialisation {
    changes_output: true,
    needs_gradients: true,
    first_rate: Some("init_step_size"),
    ..Initialisation::plain(
        "lora-sb",
        "leading singular part of the first full update, from gradients of the base weight",
        &[Paper {
            title: "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
            place: "2411.19557",
        }],
    )
};

/// Standard deviation of the initial square matrix between factors of the weight.
const NOISE: f64 = 1e-5;

/// `y = x W + b + scale ((x A) R) B`.
///
/// The default initialisation sets A and B to the singular directions of the weight, A multiplied by the singular
/// values, and R close to zero. The initialisation `lora-sb` uses those of the first update for all three; it changes
/// the output of the layer on purpose.
#[derive(Module, Debug)]
pub struct LoraXs {
    /// Frozen factor at the input `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Trained square matrix `[rank, rank]`.
    pub core: Param<Tensor<2>>,
    /// Frozen factor at the output `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
    /// Matrices that multiply the gradient of the square matrix from the left and the right, if it is corrected.
    correction: Option<[Tensor<2>; 2]>,
    #[module(skip)]
    scale: f64,
}

/// Options of [`LoraXs`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LoraXsOptions {
    /// Step size of the initial update for init = lora-sb: the learning rate of the first warm-up step.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub init_step_size: Option<f64>,
    /// Uses only the signs of the gradient for init = lora-sb, as in the first step of Adam.
    pub sign: bool,
    /// Corrects the gradient of the square so that the update is nearest to the full gradient.
    pub optimal_scaling: bool,
}

impl Default for LoraXsOptions {
    fn default() -> Self {
        Self { init_step_size: None, sign: true, optimal_scaling: false }
    }
}

impl LoraXs {
    /// Square matrix with the optional gradient correction; its value equals `core` bit for bit.
    fn square(&self) -> Tensor<2> {
        let core = self.core.val();
        match &self.correction {
            None => core,
            Some([left, right]) => {
                let still = core.clone().detach();
                still.clone() + left.clone().times(core - still).times(right.clone())
            }
        }
    }
}

impl Structure for LoraXs {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus(input, |x| x.times(self.a.val()).times(self.square()).times(self.b.val()).mul_scalar(self.scale))
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.a.val().times(self.square()).times(self.b.val()).mul_scalar(self.scale))
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        Some([self.a.val(), self.square().times(self.b.val()).mul_scalar(self.scale)])
    }
}

impl Method for LoraXs {
    type Options = LoraXsOptions;

    const LR: f64 = 1e-3;

    const SPEC: Spec = Spec {
        name: "lora-xs",
        title: "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
        arxiv: "2405.17604",
        summary: "trains a square between two frozen factors of the weight",
        trains: "r r",
        stores: "r (d_in + d_out)",
        dense_forward: false,
        rank: Rank::SmallerSide(32),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: &[&LORA_SB],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::Frozen, transposed: true },
            TensorSpec { name: "core", role: TensorRole::Core, transposed: true },
            TensorSpec { name: "b", role: TensorRole::Frozen, transposed: true },
        ],
    };

    fn check(options: &LoraXsOptions, place: &Place) -> Result<(), String> {
        place.check_rank()?;
        match options.init_step_size {
            None if place.init == LORA_SB.name => {
                Err("init = lora-sb needs init_step_size, the first learning rate of the warm-up".into())
            }
            _ => Ok(()),
        }
    }

    fn warning(place: &Place) -> Option<String> {
        let Place { rank, alpha, scale, .. } = place;
        (place.init == LORA_SB.name && *scale != 1.0).then(|| {
            format!(
                "init = lora-sb with alpha {alpha} at rank {rank}: the update is multiplied by {scale}, and its gradient matches the full gradient only at scale 1; leave alpha at the rank"
            )
        })
    }

    fn build(options: &LoraXsOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank, scale) = (site.place.shape, site.place.rank, site.place.scale);
        let start = Start::of(options, site)?;
        let a = site.frozen("a", [d_in, rank], |_| Ok(start.a))?;
        let core = site.trained("core", [rank, rank], |_| Ok(start.core))?;
        let b = site.frozen("b", [rank, d_out], |_| Ok(start.b))?;
        let correction = match options.optimal_scaling {
            false => None,
            true => {
                let left = inverse_of_products(&a.val().inner());
                let right = inverse_of_products(&b.val().inner().transpose());
                let [Some(left), Some(right)] = [left, right] else {
                    return Err(AdapterError::Refused(format!(
                        "{}: the factors have less than {rank} directions; lower the rank, or leave optimal_scaling off",
                        site.place.path
                    )));
                };
                Some([left, right.div_scalar(scale * scale)])
            }
        };
        Ok(Self { a, core, b, correction, scale })
    }
}

/// Row-major initial values of the tensors.
#[derive(Default)]
struct Start {
    a: Vec<f32>,
    core: Vec<f32>,
    b: Vec<f32>,
}

impl Start {
    /// Computes the initial values; empty if a file has the tensors.
    fn of(options: &LoraXsOptions, site: &Site<'_>) -> Result<Self, AdapterError> {
        let (rank, scale) = (site.place.rank, site.place.scale);
        if site.is_given() {
            return Ok(Self::default());
        }
        let Some(step) = options.init_step_size.filter(|_| site.place.init == LORA_SB.name) else {
            let svd = thin_svd(&site.weight(), rank);
            let sizes = TensorData::new(svd.values.iter().map(|value| *value as f32).collect::<Vec<_>>(), [1, rank]);
            let a = svd.left * Tensor::from_data(sizes, &site.plain_device());
            return Ok(Self {
                a: host(a),
                core: site.normal("core", rank * rank, NOISE),
                b: host(svd.right.transpose()),
            });
        };
        let gradient = site.gradient()?;
        let gradient = if options.sign { gradient.sign() } else { gradient };
        let svd = thin_svd(&gradient.mul_scalar(-step), rank);
        let mut core = vec![0.0; rank * rank];
        for (place, value) in svd.values.iter().enumerate() {
            core[place * (rank + 1)] = (value / scale) as f32;
        }
        Ok(Self { a: host(svd.left), core, b: host(svd.right.transpose()) })
    }
}

/// Computes `(M^T M)^-1 [rank, rank]` of a matrix `[rows, rank]`; none if its columns are linearly dependent.
fn inverse_of_products(matrix: &Tensor<2>) -> Option<Tensor<2>> {
    let rank = matrix.dims()[1];
    let svd = thin_svd(matrix, rank);
    if !svd.values.iter().all(|value| *value > 1e-6 * svd.values[0]) {
        return None;
    }
    let sizes: Vec<f32> = svd.values.iter().map(|value| value.powi(-2) as f32).collect();
    let sizes = Tensor::<2>::from_data(TensorData::new(sizes, [1, rank]), &matrix.device());
    Some((svd.right.clone() * sizes).times(svd.right.transpose()))
}

#[cfg(test)]
mod tests {
    use burn::optim::SgdConfig;
    use lowrank_optim::AdamWConfig;

    use super::*;
    use crate::bench::{Bench, close, largest, near, wave};
    use crate::{AdapterConfig, Attach, BaseGradients};

    const STEP: f64 = 0.01;

    fn config(rank: usize) -> AdapterConfig {
        AdapterConfig { init: LORA_SB.name.into(), ..AdapterConfig::new("lora-xs") }
            .with_rank(rank)
            .with_option("init_step_size", STEP)
    }

    fn begun(shape: [usize; 2], config: AdapterConfig) -> Bench {
        let gradients = BaseGradients::from([("layer".to_string(), host(wave(shape, 8).inner()))]);
        let attach = Attach::new(config).with_gradients(gradients);
        Bench::of(wave(shape, 1), None).attach(attach).unwrap()
    }

    fn update(bench: &Bench) -> Tensor<2> {
        bench.merged() - bench.weight()
    }

    #[test]
    fn at_full_rank_the_start_is_one_step_of_signs() {
        for shape in [[9, 6], [6, 9], [7, 7]] {
            let signs = wave(shape, 8).sign().mul_scalar(-STEP);
            near(update(&begun(shape, config(shape[0].min(shape[1])))), signs, 1e-4);
        }
        let plain = wave([9, 6], 8).mul_scalar(-STEP);
        near(update(&begun([9, 6], config(6).with_option("sign", false))), plain, 1e-4);
        // Alpha changes the square matrix, not the initial product.
        let [one, two] = [config(4).with_alpha(20.0), config(4)].map(|config| update(&begun([9, 6], config)));
        near(one, two, 1e-4);
    }

    #[test]
    fn the_square_of_a_whole_start_learns_as_the_weight_would() {
        let (bench, weights) = begun([7, 7], config(7)).steps(SgdConfig::new().init(), 1e-3, 3);
        let mut weight = (wave([7, 7], 1) + wave([7, 7], 8).sign().mul_scalar(-STEP)).inner();
        for (step, ours) in weights.into_iter().enumerate() {
            let (x, y) = (wave([6, 7], 50 + step).inner(), wave([6, 7], 70 + step).inner());
            let gradient = x.clone().transpose().matmul(x.matmul(weight.clone()) - y);
            weight = weight - gradient.mul_scalar(1e-3);
            near(ours, weight.clone(), 1e-5);
        }
        assert_eq!(bench.values("a"), begun([7, 7], config(7)).values("a"));
    }

    #[test]
    fn signs_of_the_directions_do_not_count() {
        let bench = begun([9, 6], config(3));
        let weights = |sign: [f32; 3]| {
            let mut tensors = bench.tensors();
            Bench::change(&mut tensors, "a", |place, value| value * sign[place / 9]);
            Bench::change(&mut tensors, "core", |place, value| value * sign[place / 3] * sign[place % 3]);
            Bench::change(&mut tensors, "b", |place, value| value * sign[place % 3]);
            let bench = Bench::of(wave([9, 6], 1), None).with_tensors(&config(3), tensors);
            bench.steps(AdamWConfig::new().init(), 1e-2, 4).1
        };
        let (one, two) = (weights([1.0; 3]), weights([-1.0, 1.0, -1.0]));
        assert!(one.into_iter().zip(two).all(|(one, two)| close(one, two, 1e-5)));
    }

    #[test]
    fn the_corrected_gradient_is_nearest_to_the_whole_one() {
        let config = AdapterConfig::new("lora-xs").with_rank(3).with_alpha(6.0);
        let attached = Bench::new(9, 6, false).with(&config).adapter();
        let Some(xs) = attached.structure.downcast_ref::<LoraXs>() else { unreachable!() };
        let (a, b, whole) = (xs.a.val().inner(), xs.b.val().inner(), wave([9, 6], 4).inner());
        let gradient = a.clone().transpose().matmul(whole.clone()).matmul(b.clone().transpose()).mul_scalar(xs.scale);
        let left = inverse_of_products(&a).unwrap();
        let right = inverse_of_products(&b.clone().transpose()).unwrap();
        let best = left.matmul(gradient).matmul(right).div_scalar(xs.scale * xs.scale);
        let away = |core: Tensor<2>| -> f32 {
            let spread = a.clone().matmul(core).matmul(b.clone()).mul_scalar(xs.scale);
            (spread - whole.clone()).square().sum().sqrt().into_scalar()
        };
        let least = away(best.clone());
        for seed in 0..10 {
            let other = wave([3, 3], seed).inner().mul_scalar(0.1 * largest(best.clone()));
            assert!(away(best.clone() + other) > least);
        }
        assert!(inverse_of_products(&Tensor::ones([9, 3], &Default::default())).is_none());
    }
}
