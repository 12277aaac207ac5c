//! Low-rank adaptation in the wavelet domain ("WaRA: Wavelet Low Rank Adaptation", arXiv 2506.24092, first version).
//! Written from the abstract and the caption of the overview figure; no code of the authors was found.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};

/// `y = x W + b + scale [c_low A B, c_high A B] M_out` with the coarse and fine halves `[c_low, c_high] = x M_in^T` of
/// a wavelet transform: one small product is applied to both.
///
/// The transforms are linear, so they are applied to the factors instead of the inputs: the layer runs as a product of
/// twice the rank, and no transformed input is formed or kept.
#[derive(Module, Debug)]
pub struct Wara {
    /// First factor `[d_in / 2, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out / 2]`, zero at the start.
    pub b: Param<Tensor<2>>,
    #[module(skip)]
    wavelet: Wavelet,
    #[module(skip)]
    scale: f64,
}

/// An orthonormal wavelet of one level with periodic border.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Wavelet {
    /// Sums and differences of pairs.
    #[default]
    Haar,
    /// Daubechies' filter of four values.
    Db2,
}

/// Options of [`Wara`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct WaraOptions {
    /// Wavelet of the transform.
    pub wavelet: Wavelet,
    /// Levels of the transform; the factors fix it at one.
    #[schemars(extend("enum" = [1]))]
    pub levels: usize,
}

impl Default for WaraOptions {
    fn default() -> Self {
        Self { wavelet: Wavelet::Haar, levels: 1 }
    }
}

impl Wavelet {
    /// Low-pass filter.
    fn low(self) -> Vec<f64> {
        match self {
            Self::Haar => vec![std::f64::consts::FRAC_1_SQRT_2; 2],
            Self::Db2 => {
                let root = 3f64.sqrt();
                [1.0 + root, 3.0 + root, 3.0 - root, 1.0 - root].map(|h| h / 32f64.sqrt()).to_vec()
            }
        }
    }

    /// Low-pass and high-pass filter.
    fn filters(self) -> [Vec<f64>; 2] {
        let low = self.low();
        let sign = |place: usize| if place.is_multiple_of(2) { 1.0 } else { -1.0 };
        let high = low.iter().rev().enumerate().map(|(place, h)| sign(place) * h).collect();
        [low, high]
    }

    /// Analysis matrix `M [n, n]` for an even `n`: the coarse half above the fine half, `M M^T = 1`.
    pub fn analysis(self, n: usize, device: &Device) -> Tensor<2> {
        let halves = self.filters().map(|filter| spread(&Tensor::eye(n / 2, device), &filter, 1));
        Tensor::cat(halves.to_vec(), 0)
    }
}

/// Spreads every element along a dimension over twice as many by a filter: the transpose of that filter's half of `M`.
fn spread(x: &Tensor<2>, filter: &[f64], dim: usize) -> Tensor<2> {
    let mut shape = x.dims();
    shape[dim] *= 2;
    let parity = |first: usize| {
        let taps = filter.iter().skip(first).step_by(2).enumerate();
        let terms = taps.map(|(shift, h)| x.clone().roll_dim(shift as i64, dim).mul_scalar(*h));
        terms.reduce(|sum, term| sum + term)
    };
    match (parity(0), parity(1)) {
        (Some(even), Some(odd)) => Tensor::stack::<3>(vec![even, odd], dim + 1).reshape(shape),
        _ => unreachable!("a filter has at least two values"),
    }
}

impl Wara {
    /// Update without its scale as a product, `[d_in, 2 rank]` and `[2 rank, d_out]`.
    fn spread_factors(&self) -> [Tensor<2>; 2] {
        let (a, b) = (self.a.val(), self.b.val());
        let filters = self.wavelet.filters();
        let [first, second] = [(a, 0), (b, 1)].map(|(factor, dim)| {
            let halves = filters.iter().map(|filter| spread(&factor, filter, dim)).collect();
            Tensor::cat(halves, 1 - dim)
        });
        [first, second]
    }
}

impl Structure for Wara {
    fn factors(&self) -> Option<Factors> {
        let [a, b] = self.spread_factors();
        Some(Factors { a, b, scale: self.scale })
    }
}

impl Method for Wara {
    type Options = WaraOptions;

    const SPEC: Spec = Spec {
        name: "wara",
        title: "WaRA: Wavelet Low Rank Adaptation",
        arxiv: "2506.24092",
        summary: "a low-rank product in the wavelet domain",
        trains: "r (d_in + d_out) / 2",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::Ranks(2.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    fn check(options: &WaraOptions, place: &Place) -> Result<(), String> {
        let ([d_in, d_out], length) = (place.shape, options.wavelet.low().len());
        let most = d_in.min(d_out) / 2;
        if !d_in.is_multiple_of(2) || !d_out.is_multiple_of(2) {
            return Err("the transform halves both sides, and one of them is odd".into());
        }
        if length > d_in.min(d_out) {
            return Err(format!("the filter of {length} values is longer than the smaller side, {}", d_in.min(d_out)));
        }
        match place.rank > most {
            true => Err(format!("rank {} is larger than half of the smaller side, {most}", place.rank)),
            false => Ok(()),
        }
    }

    fn build(options: &WaraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape.map(|side| side / 2), site.place.rank);
        let bound = (d_in as f64).sqrt().recip();
        Ok(Self {
            a: site.trained("a", [d_in, rank], |site| Ok(site.uniform("a", d_in * rank, bound)))?,
            b: site.trained("b", [rank, d_out], |_| Ok(vec![0.0; rank * d_out]))?,
            wavelet: options.wavelet,
            scale: site.place.scale,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, norm, random, rank};

    #[test]
    fn the_update_is_two_equal_blocks_in_the_wavelet_domain() {
        for (wavelet, name) in [(Wavelet::Haar, "haar"), (Wavelet::Db2, "db2")] {
            let config = AdapterConfig::new("wara").with_rank(3).with_alpha(6.0).with_option("wavelet", name);
            let tensors = [("a", vec![3, 6]), ("b", vec![9, 3])];
            let bench = Bench::filled(&config, [12, 18], &tensors);
            let device = Device::default();
            let [analysis_in, analysis_out] = [12, 18].map(|n| wavelet.analysis(n, &device));
            for (matrix, n) in [(&analysis_in, 12), (&analysis_out, 18)] {
                near(matrix.clone().matmul(matrix.clone().transpose()), Tensor::eye(n, &device), 1e-6);
            }
            let update = bench.update();
            assert_eq!(rank(&update), 6);
            let block = bench.tensor::<2>("a").transpose().matmul(bench.tensor::<2>("b").transpose());
            let zero = Tensor::zeros([6, 9], &device);
            let blocks = Tensor::cat(
                vec![Tensor::cat(vec![block.clone(), zero.clone()], 1), Tensor::cat(vec![zero, block.clone()], 1)],
                0,
            );
            assert!((norm(update.clone()) / (2.0 * 2f64.sqrt() * norm(block)) - 1.0).abs() < 1e-5);
            near(analysis_in.matmul(update).matmul(analysis_out.transpose()).div_scalar(2.0), blocks, 1e-5);
        }
    }

    #[test]
    fn it_equals_the_transform_over_tokens_and_features() {
        let config = AdapterConfig::new("wara").with_rank(2).with_alpha(2.0);
        let bench = Bench::filled(&config, [8, 12], &[("a", vec![2, 4]), ("b", vec![6, 2])]);
        let device = Device::default();
        let x = random([10, 8], 5);
        let [tokens, inputs, outputs] = [10, 8, 12].map(|n| Wavelet::Haar.analysis(n, &device));
        let blocks = tokens.clone().matmul(x.clone()).matmul(inputs.transpose());
        let product = bench.tensor::<2>("a").transpose().matmul(bench.tensor::<2>("b").transpose());
        let halves = [0, 4].map(|first| blocks.clone().narrow(1, first, 4).matmul(product.clone()));
        let y = tokens.transpose().matmul(Tensor::cat(halves.to_vec(), 1)).matmul(outputs);
        near(bench.branch(x), y, 1e-5);
    }

    #[test]
    fn constant_inputs_have_a_coarse_part_alone() {
        let config = AdapterConfig::new("wara").with_rank(2).with_alpha(4.0);
        let bench = Bench::filled(&config, [8, 12], &[("a", vec![2, 4]), ("b", vec![6, 2])]);
        let y = bench.branch(Tensor::ones([1, 8], &Device::default())).reshape([6, 2]);
        near(y.clone().narrow(1, 0, 1), y.narrow(1, 1, 1), 1e-6);
    }
}
