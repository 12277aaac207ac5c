//! Optimizers at a multiple of the learning rate.

use burn::optim::Optimizer;
use burn::tensor::{Device, Tensor};

use crate::change::WeightChange;

/// An optimizer at a multiple of the learning rate of the step.
#[derive(Clone, Debug)]
pub struct AtRate<O> {
    /// The optimizer.
    pub optimizer: O,
    /// The multiple.
    pub lr_scale: f64,
}

impl<O: Optimizer> Optimizer for AtRate<O> {
    type State<const D: usize> = O::State<D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        self.optimizer.step(lr * self.lr_scale, tensor, grad, state)
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        O::to_device(state, device)
    }
}

impl<O: WeightChange> WeightChange for AtRate<O> {
    fn change<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        self.optimizer.change(lr * self.lr_scale, tensor, grad, state)
    }
}
