//! Columns that have had no gradient yet.
//!
//! Codes between the smallest and the largest value of a row need not include 0, so that a residual quantised row by row holds
//! a small value for a column that was never used. Adam would turn it into a step of full size.

use burn::tensor::Tensor;

/// Sizes of the columns `[1, columns]` of a gradient and of its first moment `[rank, columns]`: 0 for columns without a gradient so far.
pub fn column_sizes(g: &Tensor<2>, moment: &Tensor<2>) -> Tensor<2> {
    g.clone().abs().sum_dim(0) + moment.clone().abs().sum_dim(0)
}

/// A residual without the columns that have had no gradient yet.
pub fn without_idle(residual: Tensor<2>, g: &Tensor<2>, moment: &Tensor<2>) -> Tensor<2> {
    let shape = residual.dims();
    let idle = column_sizes(g, moment).equal_elem(0.0).expand(shape);
    residual.mask_fill(idle, 0.0)
}
