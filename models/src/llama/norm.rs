//! Root-mean-square norm ("Root Mean Square Layer Normalization", arXiv 1910.07467).

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::config::LlamaConfig;
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init};

/// RMS norm over the last dimension, with a gain.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// Gain, one element per element of the last dimension.
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

impl RmsNorm {
    pub(crate) fn build(
        builder: &mut Builder,
        path: &str,
        width: usize,
        config: &LlamaConfig,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            weight: builder.vector(&format!("{path}.weight"), width, Init::Constant(1.0))?,
            eps: config.rms_norm_eps,
        })
    }

    /// `x [.., width]`, any number of leading dimensions.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        ops::rms_norm(x, self.weight.val(), self.eps)
    }
}
