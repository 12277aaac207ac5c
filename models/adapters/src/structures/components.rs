//! Components of a product in blocks: parameters of their own, so that blocks can be appended in a run, and start or rest by themselves.

use burn::module::Param;
use burn::tensor::{DType, Int, Tensor, TensorData};

/// Blocks side by side along an axis.
pub(super) fn joined<const D: usize>(blocks: &[Param<Tensor<D>>], axis: usize) -> Tensor<D> {
    match blocks {
        [one] => one.val(),
        blocks => Tensor::cat(blocks.iter().map(Param::val).collect(), axis),
    }
}

/// Number of components in each of the blocks `[d_in, n]`.
pub(super) fn counts(blocks: &[Param<Tensor<2>>]) -> Vec<usize> {
    blocks.iter().map(|block| block.lazy_shape()[1]).collect()
}

/// Factors `[d_in, r]` and `[r, d_out]` of the kept components alone.
pub(super) fn kept(a: Tensor<2>, b: Tensor<2>, keep: &[usize]) -> [Tensor<2>; 2] {
    let (device, [d_in, rank], [_, d_out]) = (a.device(), a.dims(), b.dims());
    if keep.len() == rank {
        return [a, b];
    }
    if keep.is_empty() {
        return [[d_in, 0], [0, d_out]]
            .map(|shape| Tensor::from_data(TensorData::new(Vec::<f32>::new(), shape), (&device, DType::F32)));
    }
    let places: Vec<i32> = keep.iter().map(|place| *place as i32).collect();
    let places = Tensor::<1, Int>::from_data(TensorData::new(places, [keep.len()]), (&device, DType::I32));
    [a.select(1, places.clone()), b.select(0, places)]
}
