//! The Hadamard product of two low-rank products ("FedPara: Low-Rank Hadamard Product for Communication-Efficient
//! Federated Learning", arXiv 2108.06098): up to the square of the rank with the parameters of two LoRA adapters.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::lora::NoOptions;
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use crate::init::all_random::ALL_RANDOM;

/// `y = x (W + scale (B_1 A_1) * (B_2 A_2)) + b` with the elementwise product of both parts.
///
/// Fields carry the names of the authors' code, where `w1_a` is the factor at the output.
#[derive(Module, Debug)]
pub struct LoHa {
    /// Factor of the first product at the output `[r, d_out]`.
    pub w1_a: Param<Tensor<2>>,
    /// Factor of the first product at the input `[d_in, r]`.
    pub w1_b: Param<Tensor<2>>,
    /// Factor of the second product at the output `[r, d_out]`.
    pub w2_a: Param<Tensor<2>>,
    /// Factor of the second product at the input `[d_in, r]`, zero at the start.
    pub w2_b: Param<Tensor<2>>,
    #[module(skip)]
    scale: f64,
}

impl LoHa {
    fn update(&self) -> Tensor<2> {
        let first = self.w1_b.val().matmul(self.w1_a.val());
        let second = self.w2_b.val().matmul(self.w2_a.val());
        (first * second).mul_scalar(self.scale)
    }
}

impl Structure for LoHa {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus_update(input.x, self.update())
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.update())
    }
}

impl Method for LoHa {
    type Options = NoOptions;

    const SPEC: Spec = Spec {
        name: "loha",
        title: "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        arxiv: "2108.06098",
        summary: "trains the elementwise product of two low-rank products",
        trains: "2 r (d_in + d_out)",
        stores: "",
        dense_forward: true,
        rank: Rank::Fixed(8),
        alpha: Alpha::Fixed(8.0),
        scaling: Scaling::Rank,
        inits: &[&ALL_RANDOM],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "w1_a", role: TensorRole::B, transposed: true },
            TensorSpec { name: "w1_b", role: TensorRole::A, transposed: true },
            TensorSpec { name: "w2_a", role: TensorRole::B, transposed: true },
            TensorSpec { name: "w2_b", role: TensorRole::A, transposed: true },
        ],
    };

    fn check(_options: &NoOptions, _place: &Place) -> Result<(), String> {
        Ok(())
    }

    fn build(_options: &NoOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], r) = (site.place.shape, site.place.rank);
        let random = site.place.init == ALL_RANDOM.name;
        let [inner, outer] = [d_in, r].map(|fan_in| (fan_in as f64).sqrt().recip());
        Ok(Self {
            w1_a: site.trained("w1_a", [r, d_out], |site| Ok(site.uniform("w1_a", r * d_out, outer)))?,
            w1_b: site.trained("w1_b", [d_in, r], |site| Ok(site.uniform("w1_b", d_in * r, inner)))?,
            w2_a: site.trained("w2_a", [r, d_out], |site| Ok(site.uniform("w2_a", r * d_out, outer)))?,
            w2_b: site.trained("w2_b", [d_in, r], |site| {
                Ok(if random { site.uniform("w2_b", d_in * r, inner) } else { vec![0.0; d_in * r] })
            })?,
            scale: site.place.scale,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, rank};

    #[test]
    fn the_update_has_the_square_of_the_rank_and_is_the_product_of_both_parts() {
        let config = AdapterConfig::new("loha").with_rank(2).with_alpha(6.0);
        let shapes = [("w1_a", vec![9, 2]), ("w1_b", vec![2, 12]), ("w2_a", vec![9, 2]), ("w2_b", vec![2, 12])];
        let bench = Bench::filled(&config, [12, 9], &shapes);
        let part = |a: &str, b: &str| bench.tensor::<2>(a).matmul(bench.tensor::<2>(b)).transpose();
        near(bench.update(), part("w1_a", "w1_b") * part("w2_a", "w2_b") * 3.0, 1e-6);
        assert_eq!(rank(&bench.update()), 4);
    }
}
