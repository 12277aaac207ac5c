//! Scaled sums of fixed random matrices ("RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv
//! 2502.00987), as in `peft`.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use rand::RngExt;
use rand::rngs::StdRng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Shared, SharedBytes, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use lowrank_kernels::ops::{linear, scaled_bases};
use lowrank_kernels::random::{normal_values, uniform_values};

/// `y = x W + b + scale (x U^T) B^T`, or `scale (x B) U` where `d_in > d_out`: `U[k n + b, j] = lambda[k, b] A[k, j] gamma[b, j]`, and `B`
/// holds n random matrices of `rank` columns side by side.
///
/// With `d` the smaller side, `n = ceil(d / rank)`: the update has full rank, and a higher rank trains fewer
/// parameters. One pair of random matrices, drawn from the adapter's seed, is shared by all layers and all adapters of
/// a model.
#[derive(Module, Debug)]
pub struct RandLora {
    /// Scalings on the rank side `[rank, n]`, zero at the start.
    pub lambda: Param<Tensor<2>>,
    /// Scalings on the small side `[n, d]`.
    pub gamma: Param<Tensor<2>>,
    /// Matrix `[rank, d]` of the largest layer.
    #[module(skip)]
    basis_a: Shared<2>,
    /// Matrix `[larger side, n, rank]` of the largest layer.
    #[module(skip)]
    basis_b: Shared<3>,
    /// Shape `[d_in, d_out]`.
    #[module(skip)]
    shape: [usize; 2],
    #[module(skip)]
    scale: f64,
}

/// Distribution of the random matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Draws {
    /// Uniform.
    #[default]
    Uniform,
    /// Normal.
    Normal,
}

/// Options of [`RandLora`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct RandLoraOptions {
    /// Divides the scale by sqrt(n), as in the tables of the paper.
    pub sqrt_n_scaling: bool,
    /// Distribution of dense random matrices.
    pub dist: Draws,
    /// Uses random matrices of which two thirds are 0 and the others have one magnitude.
    pub sparse: bool,
    /// Uses random matrices with one element in sqrt(d) that is not 0.
    pub very_sparse: bool,
}

impl RandLora {
    /// Elements of a sparse random matrix from uniform draws between 0 and 1: minus one below `1 / (2 s)`, one above
    /// `1 - 1 / (2 s)`, otherwise 0; then divided by their standard deviation.
    pub fn ternary(draws: &[f32], s: f64) -> Vec<f32> {
        normalised(signs(draws, s))
    }

    /// Part of the bases used by this layer: `A [rank, d]` and `B [larger side, n rank]`.
    fn bases(&self) -> [Tensor<2>; 2] {
        let ([rank, n], [_, d]) = (self.lambda.dims(), self.gamma.dims());
        let b = self.basis_b.val();
        let [most, most_bases, _] = b.dims();
        let larger = self.shape[0].max(self.shape[1]);
        let b = b.reshape([most, most_bases * rank]);
        [self.basis_a.val().narrow(1, 0, d), b.narrow(0, 0, larger).narrow(1, 0, n * rank)]
    }

    /// Computes `x U`, or `x U^T`, times the scale.
    fn steered(&self, x: Tensor<2>, a: Tensor<2>, transposed: bool) -> Tensor<2> {
        scaled_bases(x, self.lambda.val(), self.gamma.val().mul_scalar(self.scale), a, transposed)
    }
}

fn signs(draws: &[f32], s: f64) -> Vec<f32> {
    let edge = 0.5 / s;
    let sign = |draw: &f32| match f64::from(*draw) {
        draw if draw < edge => -1.0,
        draw if draw > 1.0 - edge => 1.0,
        _ => 0.0,
    };
    draws.iter().map(sign).collect()
}

/// Divides values by their unbiased standard deviation.
fn normalised(mut values: Vec<f32>) -> Vec<f32> {
    let count = values.len() as f64;
    let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum();
    let deviation = (squares / (count - 1.0)).sqrt();
    // A single value, or equal ones, have no deviation.
    if deviation > 0.0 {
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / deviation) as f32);
    }
    values
}

/// Draws a random matrix with this number of rows. No column is zero, since its inputs would never be changed.
fn drawn(options: &RandLoraOptions, random: &mut StdRng, [rows, columns]: [usize; 2], smaller: usize) -> Vec<f32> {
    let s = match (options.sparse, options.very_sparse) {
        (true, _) => 3.0,
        (_, true) => (smaller as f64).sqrt(),
        _ => {
            let count = rows * columns;
            return normalised(match options.dist {
                Draws::Uniform => uniform_values(random, count, 1.0),
                Draws::Normal => normal_values(random, count, 1.0),
            });
        }
    };
    let mut values = vec![0.0; rows * columns];
    for column in 0..columns {
        loop {
            let draws: Vec<f32> = (0..rows).map(|_| random.random()).collect();
            let signs = signs(&draws, s);
            if signs.iter().any(|sign| *sign != 0.0) {
                values.iter_mut().skip(column).step_by(columns).zip(signs).for_each(|(value, sign)| *value = sign);
                break;
            }
        }
    }
    normalised(values)
}

impl Structure for RandLora {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let ([a, b], [d_in, d_out]) = (self.bases(), self.shape);
        base.plus(input, |x| match d_in <= d_out {
            true => linear(self.steered(x, a, true), b.transpose()),
            false => self.steered(linear(x, b), a, false),
        })
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        let ([a, b], [d_in, d_out]) = (self.bases(), self.shape);
        let update = self.steered(b, a, false);
        Some(if d_in <= d_out { update.transpose() } else { update })
    }

    fn shared(&self) -> Vec<SharedBytes> {
        vec![self.basis_a.bytes(), self.basis_b.bytes()]
    }
}

impl Method for RandLora {
    type Options = RandLoraOptions;

    const LR: f64 = 1e-4;

    const SPEC: Spec = Spec {
        name: "randlora",
        title: "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
        arxiv: "2502.00987",
        summary: "steers sums of fixed random matrices; the update has full rank",
        trains: "(min(d_in, d_out) + r - 1) / r * (r + min(d_in, d_out))",
        stores: "r d + D n r of the largest layer, D the larger side, once for all layers",
        dense_forward: false,
        rank: Rank::Fixed(32),
        alpha: Alpha::Ranks(20.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "lambda", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "gamma", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "basis_a", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "basis_b", role: TensorRole::Frozen, transposed: false },
        ],
    };

    fn check(options: &RandLoraOptions, _place: &Place) -> Result<(), String> {
        match (options.sparse, options.very_sparse, options.dist) {
            (true, true, _) => Err("sparse and very_sparse are both asked for; choose one".into()),
            (true, _, Draws::Normal) | (_, true, Draws::Normal) => {
                Err("sparse random matrices have one magnitude; dist = normal has no meaning for them".into())
            }
            _ => Ok(()),
        }
    }

    fn build(options: &RandLoraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let (shape, rank) = (site.place.shape, site.place.rank);
        let (smaller, larger) = (shape[0].min(shape[1]), shape[0].max(shape[1]));
        let n = smaller.div_ceil(rank);
        // Existing bases, or those of a file, may belong to larger layers.
        let most_smaller = match site.shared_shape("basis_a").as_deref() {
            Some([_, columns]) => *columns,
            _ => site.place.largest[0].min(site.place.largest[1]),
        };
        let (most_larger, most_bases) = match site.shared_shape("basis_b").as_deref() {
            Some([rows, bases, _]) => (*rows, *bases),
            _ => (site.place.largest[0].max(site.place.largest[1]), most_smaller.div_ceil(rank)),
        };
        if most_smaller < smaller || most_larger < larger || most_bases < n {
            return Err(AdapterError::Refused(format!(
                "{}: the random matrices reach to {most_smaller} x {most_larger} with {most_bases} bases; the layer needs {smaller} x {larger} with {n}",
                site.place.path
            )));
        }
        let draw = |what: &'static str, shape: [usize; 2]| {
            move |site: &mut Site<'_>| Ok(drawn(options, &mut site.common_random(what), shape, most_smaller))
        };
        let draw_a = draw("basis_a", [rank, most_smaller]);
        let draw_b = draw("basis_b", [most_larger, most_bases * rank]);
        let scale = if options.sqrt_n_scaling { site.place.scale / (n as f64).sqrt() } else { site.place.scale };
        Ok(Self {
            lambda: site.trained("lambda", [rank, n], |_| Ok(vec![0.0; rank * n]))?,
            gamma: site
                .trained("gamma", [n, smaller], |_| Ok(vec![(n.max(smaller) as f64).recip() as f32; n * smaller]))?,
            basis_a: site.shared("basis_a", "basis_a", [rank, most_smaller], draw_a)?,
            basis_b: site.shared("basis_b", "basis_b", [most_larger, most_bases, rank], draw_b)?,
            shape,
            scale,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, random, rank};
    use burn::tensor::TensorData;

    fn tensors(rank: usize, n: usize, d: usize) -> Vec<(&'static str, Vec<usize>)> {
        vec![("lambda", vec![rank, n]), ("gamma", vec![n, d])]
    }

    #[test]
    fn the_update_has_full_rank_and_the_start_none() {
        for (shape, r) in [([12usize, 20], 5usize), ([20, 12], 4), ([9, 9], 9), ([6, 8], 1)] {
            let (d, config) = (shape[0].min(shape[1]), AdapterConfig::new("randlora").with_rank(r));
            let n = d.div_ceil(r);
            let bench = Bench::filled(&config, shape, &tensors(r, n, d));
            assert_eq!(rank(&bench.update()), d, "{shape:?}");
            let x = random([7, shape[0]], 4);
            near(bench.branch(x.clone()), x.matmul(bench.update()), 1e-4);
            let start = Bench::fresh(&config, shape).unwrap();
            let trained: usize = start.adapter().shapes().iter().map(|t| t.shape.iter().product::<usize>()).sum();
            assert_eq!(trained, n * (r + d));
            let x = random([3, shape[0]], 5);
            near(start.branch(x.clone()), start.base(x) * 0.0, 0.0);
            assert_eq!(start.learning(), BTreeMap::from([("gamma".into(), false), ("lambda".into(), true)]));
        }
    }

    #[test]
    fn swapped_sides_give_the_transposed_update() {
        let config = AdapterConfig::new("randlora").with_rank(4);
        let update = |shape| Bench::filled(&config, shape, &tensors(4, 3, 10)).update();
        near(update([10, 17]), update([17, 10]).transpose(), 1e-6);
    }

    #[test]
    fn a_layer_takes_the_leading_part_of_larger_bases() {
        let config = AdapterConfig::new("randlora").with_rank(4);
        let (a, b) = (random::<2>([4, 15], 1), random::<3>([30, 4, 4], 2));
        let update = |a: Tensor<2>, b: Tensor<3>| {
            let data = |tensor: TensorData| tensor;
            let tensors = BTreeMap::from([
                ("lambda".into(), data(random([4, 3], 3).into_data())),
                ("gamma".into(), data(random([3, 10], 4).into_data())),
                ("basis_a".into(), data(a.into_data())),
                ("basis_b".into(), data(b.into_data())),
            ]);
            Bench::holding(&config, [17, 10], tensors).map(|bench| bench.update())
        };
        let whole = update(a.clone(), b.clone()).unwrap();
        near(whole, update(a.clone().narrow(1, 0, 10), b.clone().slice([0..17, 0..3])).unwrap(), 0.0);
        assert!(update(a, b.slice([0..16, 0..3])).is_err());
    }

    #[test]
    fn scaling_is_linear_and_may_fall_with_the_bases() {
        let config = AdapterConfig::new("randlora").with_rank(4).with_alpha(8.0);
        let plain = Bench::filled(&config, [10, 17], &tensors(4, 3, 10)).update();
        let config = config.with_option("sqrt_n_scaling", true);
        near(Bench::filled(&config, [10, 17], &tensors(4, 3, 10)).update() * 3f32.sqrt(), plain, 1e-6);
    }

    #[test]
    fn sparse_bases_have_no_empty_column_and_unit_deviation() {
        for (sparse, very_sparse) in [(true, false), (false, true)] {
            let options = RandLoraOptions { sparse, very_sparse, ..Default::default() };
            let (rows, columns) = (4, 400);
            let values = drawn(&options, &mut rand::SeedableRng::seed_from_u64(1), [rows, columns], 400);
            assert!((0..columns).all(|column| (0..rows).any(|row| values[row * columns + column] != 0.0)));
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / (values.len() - 1) as f32;
            assert!((variance - 1.0).abs() < 1e-4);
            let zeros = values.iter().filter(|x| **x == 0.0).count() as f64 / values.len() as f64;
            assert!(zeros > if sparse { 0.5 } else { 0.7 }, "{zeros}");
        }
    }
}
