//! The layers of parameterizations.

use std::any::Any;

use burn::module::Param;
use burn::tensor::Tensor;

/// A layer in place of a weight `[d_in, d_out]`.
pub trait LinearLayer: Any {
    /// `x [rows, d_in]` to `[rows, d_out]`.
    fn forward(&self, x: Tensor<2>) -> Tensor<2>;

    /// The dense weight `[d_in, d_out]` that gives the same outputs, without gradient; none if a non-linearity separates the factors.
    fn to_dense(&self) -> Option<Tensor<2>>;

    /// Its bias `[d_out]`, which is stored as it is in every parameterization; none in families without.
    fn bias_mut(&mut self) -> &mut Option<Param<Tensor<1>>>;
}

/// Adds the bias `[d_out]` of a layer, if it has one, to its output `[rows, d_out]`.
pub(super) fn plus_bias(y: Tensor<2>, bias: &Option<Param<Tensor<1>>>) -> Tensor<2> {
    match bias {
        None => y,
        Some(bias) => y + bias.val().unsqueeze(),
    }
}

/// A layer of a model with its path.
pub type NamedLayer<'a> = (String, &'a mut (dyn LinearLayer + 'static));

/// Returns the layer if it is of this type.
pub(super) fn layer_of<'a, L: LinearLayer>(layer: &'a mut (dyn LinearLayer + 'static)) -> Option<&'a mut L> {
    let layer: &mut dyn Any = layer;
    layer.downcast_mut()
}
