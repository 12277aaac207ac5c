//! Changes of weights, distinguished from the weights.

use burn::optim::{Optimizer, Sgd};
use burn::tensor::Tensor;

/// An optimizer that can say by how much it changes a weight.
pub trait WeightChange: Optimizer {
    /// As [`Optimizer::step`], with the change of the parameter in place of its new value: by default their difference, in an implementation
    /// the change itself, which is not rounded to the places of the parameter.
    fn change<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let (after, state) = self.step(lr, tensor.clone(), grad, state);
        (after - tensor, state)
    }
}

impl WeightChange for Sgd {}
