//! Two factors with a non-linearity between them ("CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", arXiv 2502.10940).

use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};

use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout};

/// `y = silu(x A) B`. No dense weight gives the same outputs.
#[derive(Module, Debug)]
pub struct Cola {
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
}

impl Cola {
    pub(super) fn build(
        builder: &mut Builder,
        path: &str,
        d_in: usize,
        d_out: usize,
        rank: usize,
    ) -> Result<Self, ModelError> {
        // Entries of the product then have variance 1 / (d_in + d_out).
        let init = Init::Normal((rank as f64).powf(-0.25) * ((d_in + d_out) as f64).powf(-0.25));
        Ok(Self {
            a: builder.matrix(&format!("{path}.a"), [d_in, rank], Layout::Transposed, init)?,
            b: builder.matrix(&format!("{path}.b"), [rank, d_out], Layout::Transposed, init)?,
        })
    }

    /// `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::linear(activation::silu(ops::linear(x, self.a.val())), self.b.val())
    }
}
