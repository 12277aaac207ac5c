//! One dense weight.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::error::ModelError;
use crate::weights::{Builder, Init, Layout};

/// `y = x W`.
#[derive(Module, Debug)]
pub struct Dense {
    /// Weight `[d_in, d_out]`.
    pub weight: Param<Tensor<2>>,
}

impl Dense {
    pub(crate) fn build(builder: &mut Builder, path: &str, d_in: usize, d_out: usize) -> Result<Self, ModelError> {
        let weight = builder.matrix(&format!("{path}.weight"), [d_in, d_out], Layout::Transposed, Init::Standard)?;
        Ok(Self { weight })
    }

    /// `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        x.matmul(self.weight.val())
    }
}
