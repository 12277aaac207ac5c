//! Interface of an adapter, which every structure implements in the file of its name.

use std::fmt::Debug;

use burn::module::Module;
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::base::Base;
use super::error::AdapterError;
use super::pass::Input;
use super::site::{Place, SharedBytes, Site};
use super::spec::{Alpha, Rank, Spec};

/// Effect of one adapter on the layer `y = x W + b` that it is attached to. Weights are stored `[d_in, d_out]`.
///
/// A structure whose update is one product implements [`Structure::factors`] alone: forward pass, update and export
/// follow. Others override the methods that differ.
pub trait Structure: Debug + Send + Sync {
    /// Update as two factors and a scale, if it is their product.
    fn factors(&self) -> Option<Factors> {
        None
    }

    /// Output `[rows, d_out]` of the adapted layer. No dense update is formed unless the method requires it
    /// ([`Spec::dense_forward`]).
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        if let Some(Factors { a, b, scale }) = self.factors() {
            return base.plus_product(input, a, b, scale);
        }
        match self.delta_weight(&base.weight()) {
            Some(update) => base.plus_update(input.x, update),
            None => base.forward(input.x),
        }
    }

    /// Update `[d_in, d_out]` that the adapter adds to a weight, differentiable in the adapter's tensors; none if the
    /// effect of the adapter depends on the input. [`Spec::merges`] of such a structure gives the reason why it cannot
    /// be merged.
    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        self.factors().map(Factors::product)
    }

    /// Bias of the merged layer, if the adapter changes it.
    fn merged_bias(&self, _weight: &Tensor<2>, bias: Option<Tensor<1>>) -> Option<Tensor<1>> {
        bias
    }

    /// Weight before merging. The default is correct for updates that do not depend on the weight; others override it
    /// and return none if merging is not reversible, so that the original weight has to be kept.
    fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        let update = self.delta_weight(&merged)?;
        Some(merged - update)
    }

    /// Regularisation term and the point of the step where it is applied. It sees the layer below and the totals over
    /// all layers of the adapter.
    fn penalty(&self, _base: &Base<'_>, _totals: &Totals) -> Option<Penalty> {
        None
    }

    /// Returns true if a trained tensor is frozen in this step: its gradient is dropped, so that neither it nor its optimizer state moves.
    fn frozen_at(&self, _tensor: &str, _step: StepOf) -> bool {
        false
    }

    /// Learning rate of a trained tensor as a multiple of that of the step.
    fn lr_scale(&self, _tensor: &str) -> f64 {
        1.0
    }

    /// Frozen tensors shared with other layers.
    fn shared(&self) -> Vec<SharedBytes> {
        Vec::new()
    }

    /// Name of the basis that the columns of the factor at the input are taken from, if adapters share one.
    fn basis(&self) -> Option<String> {
        None
    }

    /// Number of elements cached in addition to its tensors; they follow from the weight.
    fn cached_values(&self) -> usize {
        0
    }

    /// Returns true if the factors start as part of the weight with every initialisation; that product is then
    /// subtracted from the base.
    fn starts_from_weight(&self) -> bool {
        false
    }

    /// Scale of the layer with this number of components, where it depends on them; otherwise it stays what it is when
    /// components are appended or dropped.
    fn scale_of(&self, _rank: usize) -> Option<f64> {
        None
    }

    /// Indices of the components that have a part in the update, where some can be without: those of closed gates are not
    /// exported. None if all have one.
    fn active_components(&self) -> Option<Vec<usize>> {
        None
    }

    /// Update as the product of two factors `[d_in, r]` and `[r, d_out]`, if it is one; exported as plain LoRA.
    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        self.factors().map(|Factors { a, b, scale }| [a, scaled(b, scale)])
    }

    /// Product of the factors, `[d_in, r]` and `[r, d_out]`, which is subtracted from the base if they start as part of
    /// the weight.
    fn product(&self) -> Option<[Tensor<2>; 2]> {
        self.as_factors()
    }
}

/// An update `scale A B`.
#[derive(Clone, Debug)]
pub struct Factors {
    /// Factor at the input `[d_in, r]`.
    pub a: Tensor<2>,
    /// Factor at the output `[r, d_out]`.
    pub b: Tensor<2>,
    /// Scale of their product.
    pub scale: f64,
}

impl Factors {
    /// Returns the dense update `[d_in, d_out]`.
    pub fn product(self) -> Tensor<2> {
        let ([d_in, rank], [_, d_out]) = (self.a.dims(), self.b.dims());
        if rank == 0 {
            return Tensor::zeros([d_in, d_out], &self.a.device());
        }
        scaled(self.a.matmul(self.b), self.scale)
    }
}

/// Multiplies a matrix by a number; returns it unchanged for 1.
fn scaled(matrix: Tensor<2>, scale: f64) -> Tensor<2> {
    if scale == 1.0 { matrix } else { matrix.mul_scalar(scale) }
}

/// Totals over all layers of one adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Number of layers that it is attached to.
    pub layers: usize,
    /// Number of trained parameters.
    pub trained: usize,
    /// Sum of the ranks of all layers.
    pub ranks: usize,
}

/// Position of a step in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepOf {
    /// Number of the optimizer step, from 0.
    pub step: u64,
    /// Steps of the whole run; none if a time limit ends it.
    pub total: Option<u64>,
}

/// A regularisation term.
#[derive(Clone, Debug)]
pub struct Penalty {
    /// Point of the step where it is applied.
    pub at: PenaltyAt,
    /// Value of the term, shape `[1]`.
    pub value: Tensor<1>,
}

/// Frobenius norm of a matrix, shape `[1]`. The gradient is 0 for norms up to `least`, where it is dominated by
/// rounding errors or 0 / 0.
pub(crate) fn frobenius(matrix: Tensor<2>, least: f64) -> Tensor<1> {
    let squares = matrix.square().sum();
    let small = squares.clone().lower_equal_elem(least * least);
    let value = squares.clone().detach().sqrt();
    squares.mask_fill(small.clone(), 1.0).sqrt().mask_where(small, value)
}

/// Point of a step where a penalty is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PenaltyAt {
    /// Added to the loss of the step.
    Loss,
    /// Its gradient, divided by the peak learning rate, is added after clipping.
    AfterClipping,
}

/// Structure that the registry can build.
pub trait Method: Structure + Module + Sized {
    /// Options in addition to rank, alpha and dropout: one field each, with documentation, default and allowed values.
    type Options: Serialize + DeserializeOwned + JsonSchema + Default + Clone + Debug;

    /// Static description: name, paper, options, memory.
    const SPEC: Spec;

    /// Default learning rate of AdamW.
    const LR: f64 = 2e-4;

    /// Default rank and alpha that depend on options; those of [`Method::SPEC`] otherwise.
    fn size(_options: &Self::Options) -> (Rank, Alpha) {
        (Self::SPEC.rank, Self::SPEC.alpha)
    }

    /// Rejects unsupported options and layers, with the reason.
    fn check(options: &Self::Options, place: &Place) -> Result<(), String>;

    /// Elements that a forward pass at a layer keeps for the backward pass, besides the inner width of each token.
    fn kept(_options: &Self::Options, place: &Place) -> usize {
        if Self::SPEC.dense_forward { place.shape[0] * place.shape[1] } else { 0 }
    }

    /// Warning about settings that are allowed at a layer but rarely intended.
    fn warning(_place: &Place) -> Option<String> {
        None
    }

    /// Builds the adapter of one layer. The site provides the tensors: from a file if one is read, otherwise from the
    /// values given here.
    fn build(options: &Self::Options, site: &mut Site<'_>) -> Result<Self, AdapterError>;

    /// Builds the same adapter with the components of `keep`, in this order, followed by new ones up to the rank of the
    /// site ([`Site::resized`] creates the tensors). Structures of a fixed size return an error.
    fn resized(&self, _keep: &[usize], site: &mut Site<'_>) -> Result<Self, AdapterError> {
        Err(AdapterError::Refused(format!(
            "{}: {} has a fixed size; its components cannot be appended or dropped in a run",
            site.place.path,
            Self::SPEC.name
        )))
    }
}
