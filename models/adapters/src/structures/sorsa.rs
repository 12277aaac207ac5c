//! Principal singular part of a weight, trained as directions and values with a regularisation toward orthonormal
//! directions ("SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language
//! Models", arXiv 2409.00055).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_optim::thin_svd;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Penalty, PenaltyAt, Structure, Totals, frobenius};
use lowrank_kernels::host::values as host;

/// `y = x W + scale ((x A) * s) B`, minus the initial value of that product.
#[derive(Module, Debug)]
pub struct Sorsa {
    /// Directions at the input `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Values `[rank]`.
    pub s: Param<Tensor<1>>,
    /// Directions at the output `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
    #[module(skip)]
    scale: f64,
    /// Weight of each of this layer's two penalty terms.
    #[module(skip)]
    pull: f64,
}

/// Options of [`Sorsa`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SorsaOptions {
    /// Strength of the pull toward orthonormal directions; 0 turns it off.
    #[schemars(range(min = 0.0))]
    pub gamma: f64,
}

impl Default for SorsaOptions {
    fn default() -> Self {
        Self { gamma: 4e-4 }
    }
}

impl Sorsa {
    /// Directions at the output, multiplied by their values.
    fn valued(&self) -> Tensor<2> {
        self.b.val() * self.s.val().unsqueeze_dim(1)
    }
}

/// Norm `|M - I|` for the products `[rank, rank]` of the directions with each other.
fn deviation(products: Tensor<2>) -> Tensor<1> {
    let [rank, _] = products.dims();
    let least = 1e-6 * (rank as f64).sqrt();
    let unit = Tensor::eye(rank, &products.device());
    frobenius(products - unit, least)
}

impl Structure for Sorsa {
    fn factors(&self) -> Option<Factors> {
        Some(Factors { a: self.a.val(), b: self.valued(), scale: self.scale })
    }

    /// Contribution of this layer to the mean over both matrices of all layers.
    fn penalty(&self, _base: &Base<'_>, _totals: &Totals) -> Option<Penalty> {
        if self.pull == 0.0 {
            return None;
        }
        let (a, b) = (self.a.val(), self.b.val());
        let at_input = deviation(a.clone().transpose().matmul(a));
        let at_output = deviation(b.clone().matmul(b.transpose()));
        Some(Penalty { at: PenaltyAt::AfterClipping, value: (at_input + at_output).mul_scalar(self.pull) })
    }

    fn starts_from_weight(&self) -> bool {
        true
    }
}

impl Method for Sorsa {
    type Options = SorsaOptions;

    const LR: f64 = 3e-5;

    const SPEC: Spec = Spec {
        name: "sorsa",
        title: "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
        arxiv: "2409.00055",
        summary: "trains the principal singular part, pulled toward orthonormal directions",
        trains: "r (d_in + d_out + 1)",
        stores: "r (d_in + d_out)",
        dense_forward: false,
        rank: Rank::Fixed(128),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "s", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    fn check(_options: &SorsaOptions, place: &Place) -> Result<(), String> {
        place.check_rank()
    }

    fn build(options: &SorsaOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let start = (!site.is_given()).then(|| thin_svd(&site.weight().transpose(), rank));
        let (a, s, b) = start.map_or_else(Default::default, |svd| {
            let values = svd.values.iter().map(|value| *value as f32).collect();
            (host(svd.right), values, host(svd.left.transpose()))
        });
        Ok(Self {
            a: site.trained("a", [d_in, rank], |_| Ok(a))?,
            s: site.trained("s", [rank], |_| Ok(s))?,
            b: site.trained("b", [rank, d_out], |_| Ok(b))?,
            scale: site.place.scale,
            pull: options.gamma / (2 * site.place.layers) as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Bench, close, largest, near};
    use crate::{AdapterConfig, add_after_clipping};
    use burn::module::Module;
    use burn::optim::GradientsParams;

    #[test]
    fn the_pull_rests_at_orthonormal_directions_and_brings_others_back() {
        let config = AdapterConfig::new("sorsa").with_rank(4).with_option("gamma", 1.0);
        let bench = Bench::new(12, 9, true);
        let pulled = |tensors| {
            let layer = bench.with_tensors(&config, tensors);
            let value: f32 = layer.penalty(PenaltyAt::AfterClipping).into_scalar();
            let none = GradientsParams::new();
            (value, layer.gradient(add_after_clipping(&layer, none, 0.5).expect("a rate above 0"), "a"))
        };
        let mut tensors = bench.with(&config).tensors();
        let (value, gradient) = pulled(tensors.clone());
        assert!(value < 1e-4 && gradient.iter().all(|gradient| *gradient == 0.0), "{value}");
        // Of c times orthonormal: (c^2 - 1) sqrt(r), half of it for one of two matrices.
        Bench::change(&mut tensors, "a", |_, value| value * 2.0);
        let (value, gradient) = pulled(tensors.clone());
        assert!((value - 3.0).abs() < 1e-5);
        // d = (1 / 2L) 2 M / |M| A divided by the learning rate: A / sqrt(r) / 0.5, with A twice orthonormal.
        let (a, _) = &tensors["a"];
        assert!(gradient.iter().zip(a).all(|(gradient, a)| (gradient - a).abs() < 1e-5));
        let layer = bench.with_tensors(&config, tensors);
        assert!(add_after_clipping(&layer, GradientsParams::new(), 0.0).is_err());
    }

    #[test]
    fn it_starts_at_the_base_and_signs_of_directions_do_not_matter() {
        let config = AdapterConfig::new("sorsa").with_rank(3).with_alpha(6.0).with_option("gamma", 0.0);
        let bench = Bench::new(8, 11, true);
        let start = bench.with(&config);
        assert!(close(start.output(), bench.output(), 1e-5) && largest(start.merged() - bench.weight()) < 1e-6);
        let mut tensors = start.tensors();
        Bench::change(&mut tensors, "a", |i, value| if i / 8 == 1 { -value } else { value });
        Bench::change(&mut tensors, "b", |i, value| if i % 3 == 1 { -value } else { value });
        let flipped = bench.with_tensors(&config, tensors);
        near(flipped.trained(3).merged(), start.trained(3).merged(), 1e-5);
        assert_eq!(start.num_params() - bench.num_params(), 3 * (8 + 11 + 1) + 3 * (8 + 11));
    }
}
