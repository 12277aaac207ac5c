//! Weight-decomposed adaptation ("DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353): a trained magnitude
//! for every output, and LoRA on the direction.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use crate::init::factors as init;
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::linear;

/// `y = x (W + scale A B) diag(m / n) + b` with n the norms of the columns of `W + scale A B`.
///
/// The paper speaks of columns of `[d_out, d_in]` weights; its code, and this one, use a magnitude for every output.
#[derive(Module, Debug)]
pub struct Dora {
    /// Factor at the input `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Factor at the output `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
    /// Trained magnitudes m `[d_out]`.
    pub magnitude: Param<Tensor<1>>,
    /// Squared norms of the stored weight's columns `[d_out]`, which never change.
    squares: Tensor<1>,
    #[module(skip)]
    scale: f64,
    #[module(skip)]
    detach_norm: bool,
}

/// Options of [`Dora`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct DoraOptions {
    /// Treats the column norms as constants in the backward pass; false computes the exact gradient, for comparison.
    pub detach_norm: bool,
}

impl Default for DoraOptions {
    fn default() -> Self {
        Self { detach_norm: true }
    }
}

/// Squared norms `[d_out]` of the columns of a weight `[d_in, d_out]`.
fn squares(weight: Tensor<2>) -> Tensor<1> {
    weight.square().sum_dim(0).squeeze_dim(0)
}

impl Dora {
    /// Factors used to compute the norms, `[d_in, rank]` and `[rank, d_out]` with the scale.
    fn length_factors(&self) -> [Tensor<2>; 2] {
        let factors = [self.a.val(), self.b.val().mul_scalar(self.scale)];
        if self.detach_norm { factors.map(Tensor::detach) } else { factors }
    }

    /// Factors of the outputs `[1, d_out]`, from squared norms. A column of zeros remains zero.
    fn gain(&self, squares: Tensor<1>) -> Tensor<2> {
        (self.magnitude.val() / squares.clamp_min(f32::MIN_POSITIVE).sqrt()).unsqueeze()
    }

    /// Squared norms of the columns of `W + scale A B`, from products with the factors: no dense sum is formed.
    fn squares_over(&self, base: &Base<'_>) -> Tensor<1> {
        let [mut a, mut b] = self.length_factors();
        let Some((weight, less)) = base.bare() else {
            return squares(base.weight() + linear(a, b));
        };
        if let Some(product) = less {
            a = Tensor::cat(vec![a, product.a.val()], 1);
            b = Tensor::cat(vec![b, product.b.val().mul_scalar(-product.scale)], 0);
        }
        // |w + A b|^2 = |w|^2 + (2 A^T w + A^T A b) b, column by column.
        let transposed = a.clone().transpose();
        let slope =
            linear(transposed.clone(), weight.clone()).mul_scalar(2.0) + linear(linear(transposed, a), b.clone());
        self.squares.clone() + (slope * b).sum_dim(0).squeeze_dim(0)
    }
}

impl Structure for Dora {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let gain = self.gain(self.squares_over(base));
        let (a, b) = (self.a.val(), self.b.val());
        if input.drops() {
            let branch = input.branch();
            let dropped = base.without_bias().forward(branch.clone());
            let product = linear(linear(branch, a), b).mul_scalar(self.scale);
            return base.forward(input.x) + dropped * gain.clone().sub_scalar(1.0) + product * gain;
        }
        let y = base.without_bias().plus_product(input, a, b, self.scale) * gain;
        match base.bias() {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        }
    }

    fn delta_weight(&self, weight: &Tensor<2>) -> Option<Tensor<2>> {
        let [a, b] = self.length_factors();
        let gain = self.gain(squares(weight.clone() + a.matmul(b)));
        let direction = weight.clone() + self.a.val().matmul(self.b.val()).mul_scalar(self.scale);
        Some(direction * gain - weight.clone())
    }

    fn unmerged(&self, _merged: Tensor<2>) -> Option<Tensor<2>> {
        // The norms before merging cannot be recovered from the merged weight.
        None
    }

    fn cached_values(&self) -> usize {
        self.squares.dims()[0]
    }

    fn product(&self) -> Option<[Tensor<2>; 2]> {
        Some([self.a.val(), self.b.val().mul_scalar(self.scale)])
    }
}

impl Method for Dora {
    type Options = DoraOptions;

    const SPEC: Spec = Spec {
        name: "dora",
        title: "DoRA: Weight-Decomposed Low-Rank Adaptation",
        arxiv: "2402.09353",
        summary: "trains the lengths of the columns, and LoRA on their directions",
        trains: "r (d_in + d_out) + d_out",
        stores: "d_out",
        dense_forward: false,
        rank: Rank::Fixed(16),
        alpha: Alpha::Ranks(2.0),
        scaling: Scaling::Rank,
        inits: init::OF_FACTORS,
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
            TensorSpec { name: "magnitude", role: TensorRole::Magnitude, transposed: false },
        ],
    };

    fn check(_options: &DoraOptions, place: &Place) -> Result<(), String> {
        init::check(place)
    }

    fn build(options: &DoraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let start = init::start(site)?;
        Ok(Self {
            a: site.trained("a", [d_in, rank], |_| Ok(start.a))?,
            b: site.trained("b", [rank, d_out], |_| Ok(start.b))?,
            magnitude: site.trained("magnitude", [d_out], |site| Ok(host(squares(site.weight()).sqrt())))?,
            squares: squares(site.stored()),
            scale: site.place.scale,
            detach_norm: options.detach_norm,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, Tensors, matrix, near, wave};

    /// Layer whose weight and factors are multiplied by `whole`, and its magnitudes by `length`.
    fn layer(whole: f64, length: f64) -> Bench {
        let values = |x: Tensor<2>, times: f64| host(x.mul_scalar(times).inner());
        let tensors = Tensors::from([
            ("a".into(), (values(wave([3, 10], 2), 1.0), vec![3, 10])),
            ("b".into(), (values(wave([8, 3], 3), whole), vec![8, 3])),
            ("magnitude".into(), (values(wave([1, 8], 4).add_scalar(2.0), length), vec![8])),
        ]);
        let config = AdapterConfig::new("dora").with_rank(3);
        Bench::of(wave([10, 8], 1).mul_scalar(whole), None).with_tensors(&config, tensors)
    }

    #[test]
    fn lengths_of_outputs_are_the_trained_ones_whatever_the_size_of_the_weight() {
        let lengths = squares(layer(1.0, 1.0).merged()).sqrt();
        let trained = layer(1.0, 1.0).values("magnitude");
        near(lengths, Tensor::<1>::from_floats(&trained[..], &Default::default()), 1e-5);
        let y = layer(1.0, 1.0).output();
        near(layer(37.0, 1.0).output(), y.clone(), 1e-5);
        near(layer(1.0, 3.0).output(), y.mul_scalar(3.0), 1e-5);
    }

    #[test]
    fn a_start_is_exact_and_columns_of_zeros_stay_so() {
        let holes = Tensor::<2>::from_floats([[1., 0., 1., 1., 1., 1., 1., 1.]], &Default::default());
        let bare = Bench::of(matrix(10, 8, 0.37) * holes, None);
        let bench = bare.with(&AdapterConfig::new("dora").with_rank(3));
        assert_eq!(host(bench.output()), host(bare.output()));
        let bench = bench.trained(3);
        assert!(bench.tensors().into_values().all(|(values, _)| values.iter().all(|value| value.is_finite())));
    }

    #[test]
    fn lengths_without_a_dense_sum_equal_those_of_the_dense_sum() {
        let bench = layer(1.0, 1.0);
        let (weight, attached) = (bench.weight(), bench.adapter());
        let Some(dora) = attached.structure.downcast_ref::<Dora>() else { unreachable!() };
        let dense = squares(weight.clone() + dora.a.val().matmul(dora.b.val()).mul_scalar(dora.scale));
        near(dora.squares_over(&Base::new(&weight, None)), dense, 1e-5);
    }
}
