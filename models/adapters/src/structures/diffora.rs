//! LoRA behind one trained weight for each layer, which a search reads to select layers ("DiffoRA: Enabling
//! Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation", arXiv 2502.08905). Our reading of
//! the abstract; no code of the authors was found.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::lora::NoOptions;
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};

/// `y = x W + gamma scale (x A) B`.
#[derive(Module, Debug)]
pub struct Diffora {
    /// Factor at the input `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Factor at the output `[rank, d_out]`, zero at the start.
    pub b: Param<Tensor<2>>,
    /// Weight of the layer `[1]`; 1 once layers are selected.
    pub gamma: Param<Tensor<1>>,
    /// Logit that a search derives the weight from `[1]`.
    pub theta: Param<Tensor<1>>,
    #[module(skip)]
    scale: f64,
}

impl Structure for Diffora {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let (a, b) = (self.a.val(), self.b.val() * self.gamma.val().unsqueeze());
        base.plus_product(input, a, b, self.scale)
    }

    fn factors(&self) -> Option<Factors> {
        Some(Factors { a: self.a.val(), b: self.b.val() * self.gamma.val().unsqueeze(), scale: self.scale })
    }
}

impl Method for Diffora {
    type Options = NoOptions;

    const SPEC: Spec = Spec {
        name: "diffora",
        title: "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation",
        arxiv: "2502.08905",
        summary: "LoRA behind one trained weight for each layer; a search selects layers by it",
        trains: "r (d_in + d_out) + 1",
        stores: "1",
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
            TensorSpec { name: "gamma", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "theta", role: TensorRole::Frozen, transposed: false },
        ],
    };

    fn check(_options: &NoOptions, _place: &Place) -> Result<(), String> {
        Ok(())
    }

    fn build(_options: &NoOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let bound = (d_in as f64).sqrt().recip();
        Ok(Self {
            a: site.trained("a", [d_in, rank], |site| Ok(site.uniform("a", d_in * rank, bound)))?,
            b: site.trained("b", [rank, d_out], |_| Ok(vec![0.0; rank * d_out]))?,
            gamma: site.trained("gamma", [1], |_| Ok(vec![0.5]))?,
            theta: site.frozen("theta", [1], |_| Ok(vec![0.0]))?,
            scale: site.place.scale,
        })
    }

    fn resized(&self, keep: &[usize], site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let appended = rank - keep.len();
        // A different random stream than that of the first components.
        let what = format!("a.{}.{rank}", self.a.dims()[1]);
        let start = |site: &mut Site<'_>| site.uniform(&what, d_in * appended, (d_in as f64).sqrt().recip());
        Ok(Self {
            a: site.resized(&self.a, [d_in, rank], 1, keep, start),
            b: site.resized(&self.b, [rank, d_out], 0, keep, |_| vec![0.0; appended * d_out]),
            gamma: self.gamma.clone(),
            theta: self.theta.clone(),
            scale: self.scale,
        })
    }
}
