//! Steps in f32, whatever the type of the parameter.

use burn::tensor::{DType, Tensor};

/// Runs a step on a parameter and its gradient in f32, and returns the parameter in its own type.
pub fn in_f32<const D: usize, S>(
    tensor: Tensor<D>,
    grad: Tensor<D>,
    step: impl FnOnce(Tensor<D>, Tensor<D>) -> (Tensor<D>, S),
) -> (Tensor<D>, S) {
    let dtype = tensor.dtype();
    let (tensor, state) = step(tensor.cast(DType::F32), grad.cast(DType::F32));
    (tensor.cast(dtype), state)
}
