//! What an adapter is: the interface that every structure implements in the file of its name.

use std::fmt::Debug;

use burn::module::Module;
use burn::tensor::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::base::{Base, Input};
use super::error::AdapterError;
use super::site::{Place, SharedBytes, Site};
use super::spec::{Alpha, Rank, Spec};

/// What one adapter does to the layer `y = x W + b` it stands on. Weights are stored `[d_in, d_out]`.
pub trait Structure: Debug + Send + Sync {
    /// The output `[rows, d_out]` of the adapted layer. No dense update is formed unless the specification of the method asks for it
    /// ([`Spec::dense_forward`] tells).
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2>;

    /// The update `[d_in, d_out]` that the adapter adds to a weight; differentiable in the adapter's tensors.
    fn update(&self, weight: &Tensor<2>) -> Tensor<2>;

    /// The bias of the merged layer, where the adapter changes it.
    fn merged_bias(&self, _weight: &Tensor<2>, bias: Option<Tensor<1>>) -> Option<Tensor<1>> {
        bias
    }

    /// The weight before it was merged. As it stands right for updates that do not depend on the weight; others override it, with none where
    /// the weight cannot be had back and must be kept.
    fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        let update = self.update(&merged);
        Some(merged - update)
    }

    /// A term that pulls the adapter's tensors somewhere, and where it enters.
    fn penalty(&self) -> Option<Penalty> {
        None
    }

    /// Whether a trained tensor rests in this step: its gradient is dropped, so that neither it nor its optimizer state moves.
    fn rests(&self, _tensor: &str, _step: StepOf) -> bool {
        false
    }

    /// Learning rate of a trained tensor as a multiple of that of the step.
    fn lr_scale(&self, _tensor: &str) -> f64 {
        1.0
    }

    /// Frozen tensors that other layers use too.
    fn shared(&self) -> Vec<SharedBytes> {
        Vec::new()
    }

    /// Values kept in memory beside its tensors, which follow from the weight.
    fn kept(&self) -> usize {
        0
    }

    /// Whether its factors begin as part of the weight whatever the initialisation; that product is then taken from the base.
    fn begins_in_weight(&self) -> bool {
        false
    }

    /// The update as two factors `[d_in, r]` and `[r, d_out]` whose product it is, where it is one: what is written as plain LoRA.
    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        None
    }

    /// The product that its factors hold, `[d_in, r]` and `[r, d_out]`: what is taken from the base where they began as part of the weight.
    fn product(&self) -> Option<[Tensor<2>; 2]> {
        self.as_factors()
    }
}

/// Where a step lies in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepOf {
    /// Number of the optimizer step, from 0.
    pub step: u64,
    /// Steps of the whole run; none when it ends by the clock.
    pub total: Option<u64>,
}

/// A term beside the loss.
#[derive(Clone, Debug)]
pub struct Penalty {
    /// Where it enters.
    pub at: PenaltyAt,
    /// Its value, shape `[1]`.
    pub value: Tensor<1>,
}

/// The Frobenius norm of a matrix, shape `[1]`. Of norms up to `least` the gradient is 0: there it is the direction of rounding errors, or 0 / 0.
pub(super) fn frobenius(matrix: Tensor<2>, least: f64) -> Tensor<1> {
    let squares = matrix.square().sum();
    let small = squares.clone().lower_equal_elem(least * least);
    let value = squares.clone().detach().sqrt();
    squares.mask_fill(small.clone(), 1.0).sqrt().mask_where(small, value)
}

/// Where a penalty enters a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PenaltyAt {
    /// Added to the loss of the step.
    Loss,
    /// Its gradient, divided by the peak learning rate, is added after clipping.
    AfterClipping,
}

/// A structure as the registry builds it.
pub trait Method: Structure + Module + Sized {
    /// Options beyond rank, alpha and dropout, with the defaults of the paper.
    type Options: Serialize + DeserializeOwned + Default + Clone + Debug;

    /// What is to be known of it.
    const SPEC: Spec;

    /// Learning rate of AdamW when none is given.
    const LR: f64 = 2e-4;

    /// Rank and alpha when none are given, where options decide; those of [`Method::SPEC`] otherwise.
    fn size(_options: &Self::Options) -> (Rank, Alpha) {
        (Self::SPEC.rank, Self::SPEC.alpha)
    }

    /// Refuses options, and places where the method has no meaning, with the reason.
    fn check(options: &Self::Options, place: &Place) -> Result<(), String>;

    /// What is allowed at a place, but rarely meant.
    fn doubt(_place: &Place) -> Option<String> {
        None
    }

    /// Builds the adapter of one layer. Tensors come from the site: from a file when one is read, else from what is given here.
    fn build(options: &Self::Options, site: &mut Site<'_>) -> Result<Self, AdapterError>;
}
