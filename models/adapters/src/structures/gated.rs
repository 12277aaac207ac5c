//! A product with a gate for every component ("Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv
//! 2311.11696).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_kernels::host::values as host;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::components::kept;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};

/// `y = x W + b + scale ((x A) * g) B`. A component whose gate is exactly 0 adds nothing and has no gradient in its
/// factors; its gate has one, so that it can come back.
#[derive(Module, Debug)]
pub struct Gated {
    /// First factor `[d_in, rank]`, uniform between plus and minus `1 / sqrt(d_in)` at the start.
    pub a: Param<Tensor<2>>,
    /// Gates `[rank]`, standard normal at the start.
    pub gate: Param<Tensor<1>>,
    /// Second factor `[rank, d_out]`, zero at the start.
    pub b: Param<Tensor<2>>,
    #[module(skip)]
    scale: f64,
    #[module(skip)]
    gate_lr_scale: f64,
}

/// Options of [`Gated`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct GatedOptions {
    /// Learning rate of the gates as a multiple of that of the factors.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub gate_lr_scale: f64,
}

impl Default for GatedOptions {
    fn default() -> Self {
        Self { gate_lr_scale: 1.0 }
    }
}

impl Structure for Gated {
    fn factors(&self) -> Option<Factors> {
        let gated = match self.gate.dims()[0] {
            0 => self.b.val(),
            _ => self.b.val() * self.gate.val().unsqueeze_dim(1),
        };
        Some(Factors { a: self.a.val(), b: gated, scale: self.scale })
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        let Factors { a, b, scale } = self.factors()?;
        Some(kept(a, b.mul_scalar(scale), &self.active_components()?))
    }

    fn lr_scale(&self, tensor: &str) -> f64 {
        if tensor == "gate" { self.gate_lr_scale } else { 1.0 }
    }

    fn active_components(&self) -> Option<Vec<usize>> {
        let gates = host(self.gate.val().without_autodiff());
        Some((0..gates.len()).filter(|component| gates[*component] != 0.0).collect())
    }
}

impl Method for Gated {
    type Options = GatedOptions;

    const SPEC: Spec = Spec {
        name: "gated",
        title: "Sparse Low-rank Adaptation of Pre-trained Language Models",
        arxiv: "2311.11696",
        summary: "a product with a gate for every component; the structure of the allocation sora",
        trains: "r (d_in + d_out + 1)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::Fixed(16.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            // Decay would close gates that the threshold leaves open.
            TensorSpec { name: "gate", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    const LR: f64 = 8e-4;

    fn check(_options: &GatedOptions, _place: &Place) -> Result<(), String> {
        Ok(())
    }

    fn build(options: &GatedOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let bound = (d_in as f64).sqrt().recip();
        Ok(Self {
            a: site.trained("a", [d_in, rank], |site| Ok(site.uniform("a", d_in * rank, bound)))?,
            gate: site.trained("gate", [rank], |site| Ok(site.normal("gate", rank, 1.0)))?,
            b: site.trained("b", [rank, d_out], |_| Ok(vec![0.0; rank * d_out]))?,
            scale: site.place.scale,
            gate_lr_scale: options.gate_lr_scale,
        })
    }

    fn resized(&self, keep: &[usize], site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let appended = rank - keep.len();
        // A different random stream than that of the first components.
        let what = |field: &str| format!("{field}.{}.{rank}", self.gate.dims()[0]);
        let bound = (d_in as f64).sqrt().recip();
        let start = |site: &mut Site<'_>| site.uniform(&what("a"), d_in * appended, bound);
        Ok(Self {
            a: site.resized(&self.a, [d_in, rank], 1, keep, start),
            gate: site.resized(&self.gate, [rank], 0, keep, |site| site.normal(&what("gate"), appended, 1.0)),
            b: site.resized(&self.b, [rank, d_out], 0, keep, |_| vec![0.0; appended * d_out]),
            ..self.clone()
        })
    }
}
