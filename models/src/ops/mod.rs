//! The operations that LLaMA is made of, for tensors of any Burn model.
//!
//! Shapes: `b` rows of a batch, `t` positions, `h` heads, `d` width.

mod attention;
mod cross_entropy;
mod rotary;

use burn::tensor::{Int, Tensor, activation};

pub use attention::causal_attention;
pub use cross_entropy::{IGNORE, linear_cross_entropy};
pub use rotary::{Rotary, rotary};

/// RMS norm over the last dimension: `x / sqrt(mean(x^2) + eps) * gain`.
///
/// "Root Mean Square Layer Normalization" (arXiv 1910.07467). `gain [d]`, `x [.., d]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, gain: Tensor<1>, eps: f64) -> Tensor<D> {
    let scale = x.clone().square().mean_dim(D - 1).add_scalar(eps).sqrt().recip();
    x * scale * gain.unsqueeze()
}

/// The gated linear unit of SwiGLU: `silu(gate) * up`, element by element.
///
/// "GLU Variants Improve Transformer" (arXiv 2002.05202).
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    activation::silu(gate) * up
}

/// Rows of `weight [vocabulary, d]` for token ids `[b, t]`: `[b, t, d]`.
pub fn embedding(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    let [batch, positions] = ids.dims();
    let width = weight.dims()[1];
    weight.select(0, ids.reshape([batch * positions])).reshape([batch, positions, width])
}
