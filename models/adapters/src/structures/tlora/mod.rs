//! A transform of the weight and a small residual ("Transformed Low-rank Adaptation via Tensor Decomposition and Its
//! Applications to Text-to-image Models", arXiv 2501.08727). Written from the text of the paper; the authors' code was
//! not available.

mod regulariser;
mod ring;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::regulariser::Regulariser;
use self::ring::{chain, transformed};
use lowrank_kernels::ops::linear;

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Penalty, PenaltyAt, Structure, Totals};
use crate::structures::modes::modes;

/// `y = (x T^T) W + b + x D`: the transform `T [d_in, d_in]` is a tensor ring over the modes of the input, dense and of
/// full rank even with small cores; the residual `D [d_in, d_out]` is another ring, or LoRA.
///
/// The transform is applied core by core. The residual runs as two factors: those of a ring of rank R have R x R as
/// their inner dimension.
#[derive(Module, Debug)]
pub struct TLora {
    /// Cores of the transform `[mode, mode, ring rank, ring rank]`.
    pub t: Vec<Param<Tensor<4>>>,
    /// Cores of the residual over the modes of the output `[mode, rank, rank]`, the first zero at the start; none with LoRA.
    pub b: Vec<Param<Tensor<3>>>,
    /// Cores of the residual over the modes of the input `[mode, rank, rank]`; none with LoRA.
    pub c: Vec<Param<Tensor<3>>>,
    /// First factor of the residual `[d_in, rank]`, with LoRA.
    pub lora_a: Option<Param<Tensor<2>>>,
    /// Second factor of the residual `[rank, d_out]`, zero at the start, with LoRA.
    pub lora_b: Option<Param<Tensor<2>>>,
    #[module(skip)]
    regulariser: Regulariser,
    #[module(skip)]
    reg_weight: f64,
    #[module(skip)]
    reg_squared: bool,
    #[module(skip)]
    scale: f64,
}

/// Form of the residual added to the transformed weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Residual {
    /// A tensor ring.
    #[default]
    Tr,
    /// A product of two factors.
    Lora,
}

/// Options of [`TLora`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct TLoraOptions {
    /// Modes of the input, whose product is d_in; two near-square ones when empty.
    pub in_dims: Vec<usize>,
    /// Modes of the output, whose product is d_out; two near-square ones when empty.
    pub out_dims: Vec<usize>,
    /// Ring rank of the transform.
    #[schemars(range(min = 1))]
    pub transform_rank: usize,
    /// Form of the residual: a tensor ring of the rank (6 when not given), or LoRA (rank 4 when not given).
    pub residual: Residual,
    /// Deviation of noise on the transform's cores over their rank; 0.001 tells equal ranks apart.
    #[schemars(range(min = 0.0))]
    pub init_noise: f64,
    /// Matrices that a penalty pulls the transform toward.
    pub regulariser: Regulariser,
    /// Weight of the penalty in the loss.
    #[schemars(range(min = 0.0))]
    pub reg_weight: f64,
    /// Squares the norms in the penalty.
    pub reg_squared: bool,
}

impl Default for TLoraOptions {
    fn default() -> Self {
        Self {
            in_dims: Vec::new(),
            out_dims: Vec::new(),
            transform_rank: 2,
            residual: Residual::Tr,
            init_noise: 0.0,
            regulariser: Regulariser::None,
            reg_weight: 0.01,
            reg_squared: false,
        }
    }
}

impl TLora {
    /// Transform `T [d_in, d_in]`.
    pub fn transform(&self) -> Tensor<2> {
        let d_in = self.t.iter().map(|core| core.dims()[0]).product();
        transformed(Tensor::eye(d_in, &self.t[0].device()), &self.t).transpose()
    }

    /// Distance of the transform's cores from those of the identity, or from those of orthogonal matrices; 0 for neither.
    pub fn distance(&self, regulariser: Regulariser) -> Tensor<1> {
        regulariser.distance(&self.t, self.reg_squared)
    }

    /// Residual as a product `[d_in, r]` and `[r, d_out]`.
    pub fn residual(&self) -> [Tensor<2>; 2] {
        if let (Some(a), Some(b)) = (&self.lora_a, &self.lora_b) {
            return [a.val(), b.val().mul_scalar(self.scale)];
        }
        let (inputs, outputs) = (chain(&self.c), chain(&self.b));
        let ([d_in, rank, _], [d_out, _, _]) = (inputs.dims(), outputs.dims());
        // The ring closes: the outer ranks of inputs and outputs are connected.
        let outputs = outputs.permute([2, 1, 0]).reshape([rank * rank, d_out]);
        [inputs.reshape([d_in, rank * rank]), outputs]
    }
}

impl Structure for TLora {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        let [a, b] = self.residual();
        let residual = linear(linear(input.x.clone(), a), b);
        base.forward(transformed(input.x, &self.t)) + residual
    }

    fn delta_weight(&self, weight: &Tensor<2>) -> Option<Tensor<2>> {
        let [a, b] = self.residual();
        let d_in = weight.dims()[0];
        let change = self.transform().transpose() - Tensor::eye(d_in, &weight.device());
        Some(change.matmul(weight.clone()) + a.matmul(b))
    }

    /// Returns none: a transform may have no usable inverse.
    fn unmerged(&self, _merged: Tensor<2>) -> Option<Tensor<2>> {
        None
    }

    fn penalty(&self, _base: &Base<'_>, _totals: &Totals) -> Option<Penalty> {
        if self.regulariser == Regulariser::None || self.reg_weight == 0.0 {
            return None;
        }
        let value = self.distance(self.regulariser).mul_scalar(self.reg_weight);
        Some(Penalty { at: PenaltyAt::Loss, value })
    }
}

impl Method for TLora {
    type Options = TLoraOptions;

    const LR: f64 = 1e-4;

    const SPEC: Spec = Spec {
        name: "tlora",
        title: "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
        arxiv: "2501.08727",
        summary: "transforms the weight by a tensor ring and adds a small residual",
        trains: "transform_rank^2 times the sum of the squared input modes + r^2 times the sum of all modes, or + r (d_in + d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(6),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "t", role: TensorRole::Transform, transposed: false },
            TensorSpec { name: "b", role: TensorRole::Block, transposed: false },
            TensorSpec { name: "c", role: TensorRole::Block, transposed: false },
            TensorSpec { name: "lora_a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "lora_b", role: TensorRole::B, transposed: true },
        ],
    };

    fn size(options: &TLoraOptions) -> (Rank, Alpha) {
        let rank = if options.residual == Residual::Lora { Rank::Fixed(4) } else { Self::SPEC.rank };
        (rank, Self::SPEC.alpha)
    }

    fn check(options: &TLoraOptions, place: &Place) -> Result<(), String> {
        modes("in_dims", &options.in_dims, place.shape[0])?;
        modes("out_dims", &options.out_dims, place.shape[1])?;
        if options.residual == Residual::Tr && place.scale != 1.0 {
            return Err(format!("a tensor ring is not scaled, and alpha = {} does; leave alpha out", place.alpha));
        }
        Ok(())
    }

    fn build(options: &TLoraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank, ring) = (site.place.shape, site.place.rank, options.transform_rank);
        let inputs = modes("in_dims", &options.in_dims, d_in).map_err(AdapterError::Refused)?;
        let outputs = modes("out_dims", &options.out_dims, d_out).map_err(AdapterError::Refused)?;
        let mut t = Vec::new();
        for (place, mode) in inputs.iter().copied().enumerate() {
            let field = format!("t.{place}");
            let start = |site: &mut Site<'_>| {
                let mut values = site.normal(&field, mode * mode * ring * ring, options.init_noise / ring as f64);
                for diagonal in values.chunks_mut(ring * ring).step_by(mode + 1) {
                    diagonal.iter_mut().for_each(|value| *value += (ring as f32).recip());
                }
                Ok(values)
            };
            t.push(site.trained(&field, [mode, mode, ring, ring], start)?);
        }
        let (mut b, mut c, mut lora_a, mut lora_b) = (Vec::new(), Vec::new(), None, None);
        match options.residual {
            Residual::Tr => {
                let core = |site: &mut Site<'_>, field: String, mode: usize| {
                    let std = if field == "b.0" { 0.0 } else { (mode as f64 * (rank as f64).sqrt()).recip() };
                    let start = |site: &mut Site<'_>| Ok(site.normal(&field, mode * rank * rank, std));
                    site.trained(&field, [mode, rank, rank], start)
                };
                for (place, mode) in outputs.into_iter().enumerate() {
                    b.push(core(site, format!("b.{place}"), mode)?);
                }
                for (place, mode) in inputs.into_iter().enumerate() {
                    c.push(core(site, format!("c.{place}"), mode)?);
                }
            }
            Residual::Lora => {
                let bound = (d_in as f64).sqrt().recip();
                let start = |site: &mut Site<'_>| Ok(site.uniform("lora_a", d_in * rank, bound));
                lora_a = Some(site.trained("lora_a", [d_in, rank], start)?);
                lora_b = Some(site.trained("lora_b", [rank, d_out], |_| Ok(vec![0.0; rank * d_out]))?);
            }
        }
        Ok(Self {
            t,
            b,
            c,
            lora_a,
            lora_b,
            regulariser: options.regulariser,
            reg_weight: options.reg_weight,
            reg_squared: options.reg_squared,
            scale: site.place.scale,
        })
    }
}

#[cfg(test)]
mod tests;
