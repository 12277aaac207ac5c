//! A low-rank product that multiplies the weight ("HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large
//! Language Models", ICLR 2025): the update has the rank of the weight.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_kernels::ops::linear;

use super::lora::NoOptions;
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use crate::init::gaussian;

/// `y = x (W + W * (A B)) + b` with the elementwise product of the weight and `A B`.
#[derive(Module, Debug)]
pub struct Hira {
    /// Factor at the input `[d_in, r]`.
    pub a: Param<Tensor<2>>,
    /// Factor at the output `[r, d_out]`, zero at the start.
    pub b: Param<Tensor<2>>,
}

impl Hira {
    fn update(&self, weight: Tensor<2>) -> Tensor<2> {
        weight * self.a.val().matmul(self.b.val())
    }
}

impl Structure for Hira {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let update = self.update(base.weight());
        match input.drops() {
            true => base.plus(input, |x| linear(x, update)),
            false => base.plus_update(input.x, update),
        }
    }

    fn delta_weight(&self, weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.update(weight.clone()))
    }

    fn unmerged(&self, _merged: Tensor<2>) -> Option<Tensor<2>> {
        // A factor near 0 leaves no trace of the weight.
        None
    }
}

impl Method for Hira {
    type Options = NoOptions;

    const SPEC: Spec = Spec {
        name: "hira",
        title: "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
        arxiv: "ICLR 2025",
        summary: "trains a product of two factors that multiplies the frozen weight",
        trains: "r (d_in + d_out)",
        stores: "",
        dense_forward: true,
        rank: Rank::Fixed(32),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[&gaussian::ABOUT],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    fn check(_options: &NoOptions, _place: &Place) -> Result<(), String> {
        Ok(())
    }

    fn build(_options: &NoOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], r) = (site.place.shape, site.place.rank);
        Ok(Self {
            a: site.trained("a", [d_in, r], |site| {
                Ok(match site.place.init.as_str() {
                    name if name == gaussian::ABOUT.name => site.normal("a", d_in * r, (r as f64).recip()),
                    _ => site.uniform("a", d_in * r, (d_in as f64).sqrt().recip()),
                })
            })?,
            b: site.trained("b", [r, d_out], |_| Ok(vec![0.0; r * d_out]))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::AdapterConfig;
    use crate::bench::{Bench, near};

    #[test]
    fn the_weight_is_multiplied_by_one_plus_the_product() {
        let bench = Bench::new(10, 7, true).moved(&AdapterConfig::new("hira").with_rank(3));
        let product = bench.tensor::<2>("b").matmul(bench.tensor::<2>("a")).transpose();
        near(bench.merged(), bench.weight() * (product + 1.0), 1e-6);
        near(bench.merge().output(), bench.output(), 1e-5);
    }
}
