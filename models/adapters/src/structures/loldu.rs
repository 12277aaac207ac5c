//! Pivots of a weight's triangular factors, trained ("LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
//! Fine-Tuning", arXiv 2410.13618).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_optim::pivoted_lu;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::linear;

/// `y = x W + ((x U) * (sigma z - sigma_0 z_0)) L` with the first rows and columns of the factors of `W = U D L`: the
/// output of the layer is unchanged at the start, bit for bit.
#[derive(Module, Debug)]
pub struct LoLdu {
    /// Lower triangle with its rows in the order of the weight `[rank, d_out]`.
    pub permuted_lower: Param<Tensor<2>>,
    /// Upper triangle `[d_in, rank]`.
    pub upper: Param<Tensor<2>>,
    /// Pivots subtracted from the base `[rank]`.
    pub z_0: Param<Tensor<1>>,
    /// Trained pivots `[rank]`.
    pub z: Param<Tensor<1>>,
    /// Factor of all pivots `[1]`; none if it is not trained.
    pub sigma: Option<Param<Tensor<1>>>,
    #[module(skip)]
    sigma_0: f64,
}

/// Initial values of the trained pivots; `m` and `v` are mean and deviation of the weight's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PivotStart {
    /// The weight's own.
    #[default]
    Lu,
    /// Uniform between plus and minus `|m| / 2`.
    Uniform,
    /// Uniform between plus and minus 1.
    SUniform,
    /// Normal around `m` with deviation `v`.
    Normal,
    /// Normal around 0 with deviation 1.
    SNormal,
    /// `m`.
    Constant,
    /// 1.
    Ones,
    /// 0.
    Zeros,
}

/// Options of [`LoLdu`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LoLduOptions {
    /// Trains the factor of all pivots, as in the paper; the official code does not.
    pub train_sigma: bool,
    /// Initial values of the trained pivots.
    pub z_init: PivotStart,
    /// Subtracts the weight's own pivots from the base whatever `z_init` is, as in the official code: the layer then starts as something else than the base.
    pub residual_from_lu: bool,
}

impl Default for LoLduOptions {
    fn default() -> Self {
        Self { train_sigma: true, z_init: PivotStart::Lu, residual_from_lu: false }
    }
}

impl LoLdu {
    /// Change of the pivots, `[1, rank]`.
    fn moved(&self) -> Tensor<2> {
        let pivots = match &self.sigma {
            Some(sigma) => self.z.val() * sigma.val(),
            None => self.z.val().mul_scalar(self.sigma_0),
        };
        (pivots - self.z_0.val().mul_scalar(self.sigma_0)).unsqueeze()
    }
}

impl Structure for LoLdu {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus(input, |x| linear(linear(x, self.upper.val()) * self.moved(), self.permuted_lower.val()))
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some((self.upper.val() * self.moved()).matmul(self.permuted_lower.val()))
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        Some([self.upper.val() * self.moved(), self.permuted_lower.val()])
    }
}

impl Method for LoLdu {
    type Options = LoLduOptions;

    const LR: f64 = 1e-3;

    const SPEC: Spec = Spec {
        name: "loldu",
        title: "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
        arxiv: "2410.13618",
        summary: "trains the pivots of the weight's triangular factors",
        trains: "r + 1",
        stores: "r (d_in + d_out + 1)",
        dense_forward: false,
        rank: Rank::SmallerSide(1024),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "permuted_lower", role: TensorRole::Frozen, transposed: true },
            TensorSpec { name: "upper", role: TensorRole::Frozen, transposed: true },
            TensorSpec { name: "z_0", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "z", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "sigma", role: TensorRole::Vector, transposed: false },
        ],
    };

    fn check(_options: &LoLduOptions, place: &Place) -> Result<(), String> {
        place.check_rank()
    }

    fn build(options: &LoLduOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank, sigma_0) = (site.place.shape, site.place.rank, site.place.scale);
        let start = if site.is_given() { Start::default() } else { Start::of(options, site) };
        let sigma = match options.train_sigma {
            true => Some(site.trained("sigma", [1], |_| Ok(vec![sigma_0 as f32]))?),
            false => None,
        };
        Ok(Self {
            permuted_lower: site.frozen("permuted_lower", [rank, d_out], |_| Ok(start.lower))?,
            upper: site.frozen("upper", [d_in, rank], |_| Ok(start.upper))?,
            z_0: site.frozen("z_0", [rank], |_| Ok(start.z_0))?,
            z: site.trained("z", [rank], |_| Ok(start.z))?,
            sigma,
            sigma_0,
        })
    }
}

/// Row-major initial values of the tensors.
#[derive(Default)]
struct Start {
    lower: Vec<f32>,
    upper: Vec<f32>,
    z_0: Vec<f32>,
    z: Vec<f32>,
}

impl Start {
    fn of(options: &LoLduOptions, site: &Site<'_>) -> Self {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let lu = pivoted_lu(&site.weight().transpose());
        let mut lower = vec![0.0; rank * d_out];
        let columns = host(lu.lower.slice([0..d_out, 0..rank]).transpose());
        for (to, from) in lower.chunks_exact_mut(d_out).zip(columns.chunks_exact(d_out)) {
            lu.permutation.iter().zip(from).for_each(|(place, value)| to[*place] = *value);
        }
        let own: Vec<f32> = lu.diagonal[..rank].iter().map(|pivot| *pivot as f32).collect();
        let z = begin(options.z_init, &lu.diagonal[..rank], site);
        Self {
            lower,
            upper: host(lu.upper.slice([0..rank, 0..d_in]).transpose()),
            z_0: if options.residual_from_lu { own } else { z.clone() },
            z,
        }
    }
}

fn begin(start: PivotStart, own: &[f64], site: &Site<'_>) -> Vec<f32> {
    let count = own.len();
    let mean = own.iter().sum::<f64>() / count as f64;
    let squares: f64 = own.iter().map(|pivot| (pivot - mean) * (pivot - mean)).sum();
    // A single pivot has no standard deviation.
    let deviation = (squares / (count - 1).max(1) as f64).sqrt();
    match start {
        PivotStart::Lu => own.iter().map(|pivot| *pivot as f32).collect(),
        PivotStart::Uniform => site.uniform("z", count, mean.abs() / 2.0),
        PivotStart::SUniform => site.uniform("z", count, 1.0),
        PivotStart::Normal => site.normal("z", count, deviation).iter().map(|draw| draw + mean as f32).collect(),
        PivotStart::SNormal => site.normal("z", count, 1.0),
        PivotStart::Constant => vec![mean as f32; count],
        PivotStart::Ones => vec![1.0; count],
        PivotStart::Zeros => vec![0.0; count],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, largest, matrix, near};

    #[test]
    fn every_start_is_the_base_but_that_of_the_authors_code() {
        let bench = Bench::new(10, 7, true);
        for z_init in ["lu", "uniform", "s_uniform", "normal", "s_normal", "constant", "ones", "zeros"] {
            let config = AdapterConfig::new("loldu").with_rank(4).with_alpha(10.0).with_option("z_init", z_init);
            assert_eq!(largest(bench.with(&config).output() - bench.output()), 0.0, "{z_init}");
            let code = config.with_option("residual_from_lu", true);
            assert_eq!(largest(bench.with(&code).output() - bench.output()) == 0.0, z_init == "lu");
        }
    }

    #[test]
    fn sigma_and_pivots_scale_against_each_other() {
        let config = AdapterConfig::new("loldu").with_rank(5);
        let bench = Bench::new(6, 11, false);
        let one = bench.moved(&config);
        let mut tensors = one.tensors();
        Bench::change(&mut tensors, "sigma", |_, value| value * 2.0);
        Bench::change(&mut tensors, "z", |_, value| value / 2.0);
        near(bench.with_tensors(&config, tensors).merged(), one.merged(), 1e-6);
        let fixed = bench.with(&config.with_option("train_sigma", false));
        assert!(!fixed.tensors().contains_key("sigma"));
    }

    #[test]
    fn singular_weights_have_finite_factors_that_give_them_back() {
        let same = matrix(8, 1, 0.37).repeat_dim(1, 6);
        let gap = Tensor::cat(vec![matrix(8, 3, 0.37), same.clone().narrow(1, 0, 3) * 0.0], 1);
        for weight in [same.clone() * 0.0, same, gap] {
            let config = AdapterConfig::new("loldu");
            let bench = Bench::of(weight.clone(), None).with(&config);
            let z: Tensor<1> = Tensor::from_data(bench.values("z").as_slice(), &weight.device());
            let product =
                bench.tensor::<2>("permuted_lower").matmul(z.unsqueeze_dim::<2>(1) * bench.tensor::<2>("upper"));
            assert!(largest(product.transpose() - weight) < 1e-5);
        }
    }
}
