//! Parts of a step that its phases share.

use burn::tensor::Tensor;

use crate::projected::config::ProjectedConfig;
use crate::projected::subspace::Open;

/// Parts of a step that stay the same within it.
pub struct StepParts<'a> {
    pub c: &'a ProjectedConfig,
    pub right: bool,
    /// The gradient, with the residual of error feedback.
    pub g: Tensor<2>,
    pub subspace: Open,
}

/// First and second moment.
pub type Moments = (Tensor<2>, Option<Tensor<2>>);
