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
/// A structure whose update is one product gives [`Structure::factors`] and nothing else: forward pass, update and export follow. Others override
/// what they do in another way.
pub trait Structure: Debug + Send + Sync {
    /// The update as two factors and a scale, where it is their product.
    fn factors(&self) -> Option<Factors> {
        None
    }

    /// The output `[rows, d_out]` of the adapted layer. No dense update is formed unless the specification of the method asks for it
    /// ([`Spec::dense_forward`] tells).
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        if let Some(Factors { a, b, scale }) = self.factors() {
            return base.plus_product(input, a, b, scale);
        }
        match self.delta_weight(&base.weight()) {
            Some(update) => base.plus_update(input.x, update),
            None => base.forward(input.x),
        }
    }

    /// The update `[d_in, d_out]` that the adapter adds to a weight, differentiable in the adapter's tensors; none where there is none, because what
    /// the adapter does depends on the input. Such a structure says in [`Spec::merges`] why it cannot become part of the weight.
    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        self.factors().map(Factors::product)
    }

    /// The bias of the merged layer, where the adapter changes it.
    fn merged_bias(&self, _weight: &Tensor<2>, bias: Option<Tensor<1>>) -> Option<Tensor<1>> {
        bias
    }

    /// Weight before merging. Correct as it is for updates that do not depend on the weight; others override it and return none where merging
    /// is not reversible, so that the weight has to be kept.
    fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        let update = self.delta_weight(&merged)?;
        Some(merged - update)
    }

    /// A regularisation term and the point of the step where it is applied. It sees the layer below and the sums over all layers of the
    /// adapter.
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

    /// Frozen tensors that other layers use too.
    fn shared(&self) -> Vec<SharedBytes> {
        Vec::new()
    }

    /// Number of elements cached in addition to its tensors; they follow from the weight.
    fn cached_values(&self) -> usize {
        0
    }

    /// Returns true if its factors start as part of the weight whatever the initialisation; that product is then subtracted from the base.
    fn starts_from_weight(&self) -> bool {
        false
    }

    /// The update as two factors `[d_in, r]` and `[r, d_out]` whose product it is, where it is one: what is written as plain LoRA.
    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        self.factors().map(|Factors { a, b, scale }| [a, scaled(b, scale)])
    }

    /// Product of its factors, `[d_in, r]` and `[r, d_out]`, which is subtracted from the base where they started as part of the weight.
    fn product(&self) -> Option<[Tensor<2>; 2]> {
        self.as_factors()
    }
}

/// An update `scale A B`.
#[derive(Clone, Debug)]
pub struct Factors {
    /// The factor at the input `[d_in, r]`.
    pub a: Tensor<2>,
    /// The factor at the output `[r, d_out]`.
    pub b: Tensor<2>,
    /// Scale of their product.
    pub scale: f64,
}

impl Factors {
    /// The dense update `[d_in, d_out]`.
    pub fn product(self) -> Tensor<2> {
        let ([d_in, rank], [_, d_out]) = (self.a.dims(), self.b.dims());
        if rank == 0 {
            return Tensor::zeros([d_in, d_out], &self.a.device());
        }
        scaled(self.a.matmul(self.b), self.scale)
    }
}

/// A matrix times a number; as it is times 1.
fn scaled(matrix: Tensor<2>, scale: f64) -> Tensor<2> {
    if scale == 1.0 { matrix } else { matrix.mul_scalar(scale) }
}

/// Sums over all layers of one adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Layers it stands on.
    pub layers: usize,
    /// Values that are trained.
    pub trained: usize,
    /// Ranks of all layers together.
    pub ranks: usize,
}

/// Position of a step in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepOf {
    /// Number of the optimizer step, from 0.
    pub step: u64,
    /// Steps of the whole run; none when it ends by the clock.
    pub total: Option<u64>,
}

/// A regularisation term.
#[derive(Clone, Debug)]
pub struct Penalty {
    /// Point of the step where it is applied.
    pub at: PenaltyAt,
    /// Its value, shape `[1]`.
    pub value: Tensor<1>,
}

/// The Frobenius norm of a matrix, shape `[1]`. Of norms up to `least` the gradient is 0: there it is the direction of rounding errors, or 0 / 0.
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

/// A structure as the registry builds it.
pub trait Method: Structure + Module + Sized {
    /// Options beyond rank, alpha and dropout: a field each, with its documentation, its default and what it allows.
    type Options: Serialize + DeserializeOwned + JsonSchema + Default + Clone + Debug;

    /// Static description: name, paper, options, memory.
    const SPEC: Spec;

    /// Learning rate of AdamW when none is given.
    const LR: f64 = 2e-4;

    /// Rank and alpha when none are given, where options decide; those of [`Method::SPEC`] otherwise.
    fn size(_options: &Self::Options) -> (Rank, Alpha) {
        (Self::SPEC.rank, Self::SPEC.alpha)
    }

    /// Refuses options, and places where the method has no meaning, with the reason.
    fn check(options: &Self::Options, place: &Place) -> Result<(), String>;

    /// Warning about settings that are allowed at a layer but rarely intended.
    fn warning(_place: &Place) -> Option<String> {
        None
    }

    /// Builds the adapter of one layer. Tensors come from the site: from a file when one is read, else from what is given here.
    fn build(options: &Self::Options, site: &mut Site<'_>) -> Result<Self, AdapterError>;

    /// The same adapter with the components of `keep`, in this order, and new ones behind them up to the rank of the site
    /// ([`Site::resized`] makes the tensors). Structures whose size is fixed refuse.
    fn resized(&self, _keep: &[usize], site: &mut Site<'_>) -> Result<Self, AdapterError> {
        Err(AdapterError::Refused(format!(
            "{}: {} has a fixed size; its components cannot be appended or dropped in a run",
            site.place.path,
            Self::SPEC.name
        )))
    }
}
