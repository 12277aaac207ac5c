//! Low-rank adaptation ("LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685): a trained product beside a frozen weight.
//!
//! The adapter is Burn's own [`LoraAdapter`]; here it learns to run factored, to start as `peft` starts it, and to be one of the structures.

use burn::module::LoraAdapter;
use burn::tensor::Tensor;

use super::base::{Base, Input};
use super::config::Scaling;
use super::error::AdapterError;
use super::init;
use super::site::{Place, Site};
use super::structure::{Alpha, Method, Rank, Spec, Structure, TensorRole, TensorSpec};

/// LoRA has no options beyond rank, alpha, scaling, dropout and start.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct NoOptions;

impl Structure for LoraAdapter {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus_product(input, self.a.val(), self.b.val(), self.scale)
    }

    fn update(&self, _weight: &Tensor<2>) -> Tensor<2> {
        self.delta()
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        Some([self.a.val(), self.b.val().mul_scalar(self.scale)])
    }
}

impl Method for LoraAdapter {
    type Options = NoOptions;

    const SPEC: Spec = Spec {
        name: "lora",
        title: "LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv: "2106.09685",
        trains: "r (d_in + d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: init::OF_FACTORS,
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        peft_type: "LORA",
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, turned: true },
            TensorSpec { name: "b", role: TensorRole::B, turned: true },
        ],
        options: &[],
    };

    fn check(_options: &NoOptions, place: &Place) -> Result<(), String> {
        init::check(place)
    }

    fn build(_options: &NoOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let start = init::Factors::of(site)?;
        Ok(Self {
            a: site.trained("a", [d_in, rank], |_| Ok(start.a))?,
            b: site.trained("b", [rank, d_out], |_| Ok(start.b))?,
            scale: site.place.scale,
        })
    }
}
