//! The layer below an adapter.

use std::fmt::Debug;

use burn::module::LoraAdapter;
use burn::tensor::Tensor;

use super::pass::Input;
use lowrank_kernels::ops;

/// Adapters below another one, as seen by it: the first `count` of them on a base.
pub trait Below: Debug {
    /// Output `[rows, d_out]`.
    fn forward(&self, count: usize, base: Base<'_>, x: Tensor<2>) -> Tensor<2>;
    /// Effective weight `[d_in, d_out]`.
    fn weight(&self, count: usize, base: Base<'_>) -> Tensor<2>;
    /// Effective bias `[d_out]`.
    fn bias(&self, count: usize, base: Base<'_>) -> Option<Tensor<1>>;
}

/// Layer that an adapter is attached to: a weight that never changes, and the adapters below.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    weight: &'a Tensor<2>,
    bias: Option<&'a Tensor<1>>,
    below: Option<(&'a dyn Below, usize)>,
    less: Option<&'a LoraAdapter>,
}

impl<'a> Base<'a> {
    /// Creates a bare layer: weight `[d_in, d_out]`, bias `[d_out]`.
    pub fn new(weight: &'a Tensor<2>, bias: Option<&'a Tensor<1>>) -> Self {
        Self { weight, bias, below: None, less: None }
    }

    /// Returns the same layer with the first `count` of these adapters on it.
    pub fn under(self, below: &'a dyn Below, count: usize) -> Self {
        Self { below: (count > 0).then_some((below, count)), less: None, ..self }
    }

    /// Returns the stored weight and bias alone.
    fn stored(&self) -> Self {
        Self { below: None, less: None, ..*self }
    }

    /// Subtracts the product that the adapter above starts from.
    pub(crate) fn less(self, product: Option<&'a LoraAdapter>) -> Self {
        Self { less: product, ..self }
    }

    /// Returns the same layer without its bias.
    pub fn without_bias(&self) -> Self {
        Self { bias: None, ..*self }
    }

    /// Stored weight and the product subtracted from it, if there is no adapter in between.
    pub(crate) fn bare(&self) -> Option<(&'a Tensor<2>, Option<&'a LoraAdapter>)> {
        self.below.is_none().then_some((self.weight, self.less))
    }

    /// Shape `[d_in, d_out]`.
    pub fn shape(&self) -> [usize; 2] {
        self.weight.dims()
    }

    /// Maps `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = match self.below {
            Some((below, count)) => below.forward(count, self.stored(), x.clone()),
            None => self.biased(ops::linear(x.clone(), self.weight.clone())),
        };
        match self.less {
            Some(product) => y - branch(product, x),
            None => y,
        }
    }

    /// Output plus that of a branch.
    pub fn plus(&self, input: Input, branch: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
        let branch = branch(input.branch());
        self.forward(input.x) + branch
    }

    /// Output plus that of two factors: `x W + b + scale (x A) B`.
    pub fn plus_product(&self, input: Input, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
        if a.dims()[1] == 0 {
            return self.forward(input.x);
        }
        if self.is_bare() && input.is_plain() {
            // No adapter in between: one operation that keeps only its inputs.
            return self.biased(ops::low_rank_linear(input.x, self.weight.clone(), a, b, scale));
        }
        self.plus(input, |x| ops::linear(ops::linear(x, a), b).mul_scalar(scale))
    }

    /// Output plus `(x A) B`, where A and B use a learning-rate scale `[d_out]` for each output; see
    /// [`ops::lr_scaled_low_rank_linear`].
    pub fn plus_lr_scaled_product(
        &self,
        input: Input,
        a: Tensor<2>,
        b: Tensor<2>,
        output_lr_scale: Tensor<1>,
    ) -> Tensor<2> {
        if self.is_bare() && input.is_plain() {
            return self.biased(ops::lr_scaled_low_rank_linear(input.x, self.weight.clone(), a, b, output_lr_scale));
        }
        self.plus(input, |x| ops::lr_scaled_product(x, a, b, output_lr_scale))
    }

    /// Output with a dense update `[d_in, d_out]` of the weight: `x (W + update) + b`.
    pub fn plus_update(&self, x: Tensor<2>, update: Tensor<2>) -> Tensor<2> {
        match self.is_bare() {
            true => self.biased(ops::linear(x, ops::widened(self.weight.clone()) + update)),
            false => self.forward(x.clone()) + ops::linear(x, update),
        }
    }

    /// Returns true if there is only the weight and its bias.
    fn is_bare(&self) -> bool {
        self.below.is_none() && self.less.is_none()
    }

    fn biased(&self, y: Tensor<2>) -> Tensor<2> {
        match self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// Effective dense weight `[d_in, d_out]`.
    pub fn weight(&self) -> Tensor<2> {
        let weight = match self.below {
            Some((below, count)) => below.weight(count, self.stored()),
            // In f32, whatever its storage.
            None => ops::widened(self.weight.clone()),
        };
        match self.less {
            Some(product) => weight - product.delta(),
            None => weight,
        }
    }

    /// Effective bias `[d_out]`.
    pub fn bias(&self) -> Option<Tensor<1>> {
        match self.below {
            Some((below, count)) => below.bias(count, self.stored()),
            None => self.bias.cloned(),
        }
    }
}

/// Computes `scale (x A) B`.
pub(crate) fn branch(product: &LoraAdapter, x: Tensor<2>) -> Tensor<2> {
    ops::linear(ops::linear(x, product.a.val()), product.b.val()).mul_scalar(product.scale)
}
