//! The layer below an adapter.

use burn::module::LoraAdapter;
use burn::tensor::Tensor;

use super::stack::Attached;
use crate::ops;

/// The layer that an adapter stands on: a weight that is never changed, and the adapters below.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    weight: &'a Tensor<2>,
    bias: Option<&'a Tensor<1>>,
    below: &'a [Attached],
    less: Option<&'a LoraAdapter>,
}

impl<'a> Base<'a> {
    /// A bare layer: weight `[d_in, d_out]`, bias `[d_out]`.
    pub fn new(weight: &'a Tensor<2>, bias: Option<&'a Tensor<1>>) -> Self {
        Self { weight, bias, below: &[], less: None }
    }

    pub(super) fn under(self, below: &'a [Attached]) -> Self {
        Self { below, less: None, ..self }
    }

    /// Without a product that the adapter above starts with.
    pub(super) fn less(self, product: Option<&'a LoraAdapter>) -> Self {
        Self { less: product, ..self }
    }

    /// `[d_in, d_out]`.
    pub fn shape(&self) -> [usize; 2] {
        self.weight.dims()
    }

    /// `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = match self.below.split_last() {
            Some((top, below)) => top.forward(Self { below, less: None, ..*self }, x.clone()),
            None => {
                let y = x.clone().matmul(self.weight.clone());
                match self.bias {
                    Some(bias) => y + bias.clone().unsqueeze(),
                    None => y,
                }
            }
        };
        match self.less {
            Some(product) => y - branch(product, x),
            None => y,
        }
    }

    /// The output with that of a branch beside it.
    pub fn plus(&self, input: Input, branch: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
        let branch = branch(input.branch());
        self.forward(input.x) + branch
    }

    /// The output with that of two factors beside it: `x W + b + scale (x A) B`.
    pub fn plus_product(&self, input: Input, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
        match (self.below, self.less, &input.dropped) {
            // Nothing in between: one operation that keeps only its inputs.
            ([], None, None) => {
                let y = ops::low_rank_linear(input.x, self.weight.clone(), a, b, scale);
                match self.bias {
                    Some(bias) => y + bias.clone().unsqueeze(),
                    None => y,
                }
            }
            _ => self.plus(input, |x| x.matmul(a).matmul(b).mul_scalar(scale)),
        }
    }

    /// The dense weight `[d_in, d_out]` as it acts.
    pub fn weight(&self) -> Tensor<2> {
        let weight = match self.below.split_last() {
            Some((top, below)) => top.weight(Self { below, less: None, ..*self }),
            None => self.weight.clone(),
        };
        match self.less {
            Some(product) => weight - product.delta(),
            None => weight,
        }
    }

    /// The bias `[d_out]` as it acts.
    pub fn bias(&self) -> Option<Tensor<1>> {
        match self.below.split_last() {
            Some((top, below)) => top.bias(Self { below, less: None, ..*self }),
            None => self.bias.cloned(),
        }
    }
}

/// `scale (x A) B`.
pub(super) fn branch(product: &LoraAdapter, x: Tensor<2>) -> Tensor<2> {
    x.matmul(product.a.val()).matmul(product.b.val()).mul_scalar(product.scale)
}

/// What comes into a layer: `x [rows, d_in]`, and what of it the branches see under dropout.
#[derive(Clone, Debug)]
pub struct Input {
    /// The input as it is.
    pub x: Tensor<2>,
    pub(super) dropped: Option<Tensor<2>>,
}

impl Input {
    /// An input without dropout.
    pub fn new(x: Tensor<2>) -> Self {
        Self { x, dropped: None }
    }

    /// What the branch sees.
    pub fn branch(&self) -> Tensor<2> {
        self.dropped.as_ref().unwrap_or(&self.x).clone()
    }
}
