//! One dense weight, and the adapters that stand on it.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::weights::{Builder, Init, Layout};
use lowrank_adapters::Adapter;

/// `y = x W`, or `y = x W + b`.
#[derive(Module, Debug)]
pub struct Dense {
    /// Weight `[d_in, d_out]`.
    pub weight: Param<Tensor<2>>,
    /// Bias `[d_out]`; the layers of LLaMA have none.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Dense {
    pub(crate) fn build(builder: &mut Builder, path: &str, d_in: usize, d_out: usize) -> Result<Self, ModelError> {
        let weight = builder.matrix(&format!("{path}.weight"), [d_in, d_out], Layout::Transposed, Init::Standard)?;
        Ok(Self { weight, bias: None })
    }

    /// A layer of given parts: weight `[d_in, d_out]`, bias `[d_out]`.
    pub fn from_parts(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self { weight: Param::from_tensor(weight), bias: bias.map(Param::from_tensor) }
    }

    /// `x [rows, d_in]` to `[rows, d_out]`. Adapters run factored.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        Adapter::linear(&self.weight, self.bias.as_ref().map(Param::val), x)
    }
}
