//! Tensor rings: matrices whose elements are traces of products of small cores, one per mode.

use burn::module::Param;
use burn::tensor::Tensor;

use lowrank_kernels::ops::linear;

/// Product of ring cores `[mode, rank, rank]` over all modes: `[product of the modes, rank, rank]`.
pub(super) fn chain(cores: &[Param<Tensor<3>>]) -> Tensor<3> {
    let product = cores.iter().map(Param::val).reduce(|product, core| {
        let ([count, rank, _], [mode, _, _]) = (product.dims(), core.dims());
        let core = core.swap_dims(0, 1).reshape([rank, mode * rank]);
        let next = linear(product.reshape([count * rank, rank]), core).reshape([count, rank, mode, rank]);
        next.swap_dims(1, 2).reshape([count * mode, rank, rank])
    });
    match product {
        Some(product) => product,
        None => unreachable!("both sides have at least one mode"),
    }
}

/// Computes `x T^T` core by core, from the last mode to the first: `x [rows, d_in]`.
pub(super) fn transformed(x: Tensor<2>, cores: &[Param<Tensor<4>>]) -> Tensor<2> {
    let [rows, d_in] = x.dims();
    let Some((first, others)) = cores.split_first() else { unreachable!("the input has at least one mode") };
    let [mode, _, rank, _] = first.dims();
    let Some((last, between)) = others.split_last() else {
        // A ring of one core is the trace over its ranks.
        let sum = (0..rank).map(|r| first.val().slice([0..mode, 0..mode, r..r + 1, r..r + 1]).reshape([mode, mode]));
        return match sum.reduce(|sum, slice| sum + slice) {
            Some(matrix) => linear(x, matrix.transpose()),
            None => unreachable!("a ring has a rank of at least one"),
        };
    };
    // [rows and modes before, left rank, closing rank, modes after]
    let mut after = last.dims()[0];
    let matrix = last.val().permute([1, 2, 3, 0]).reshape([after, rank * rank * after]);
    let mut state = linear(x.reshape([rows * d_in / after, after]), matrix);
    for core in between.iter().rev() {
        let mode = core.dims()[0];
        let before = rows * d_in / (mode * after);
        let matrix = core.val().permute([1, 3, 2, 0]).reshape([mode * rank, rank * mode]);
        let rows = state.reshape([before, mode * rank, rank * after]).swap_dims(1, 2);
        let next = linear(rows.reshape([before * rank * after, mode * rank]), matrix);
        let next = next.reshape([before, rank, after, rank, mode]).permute([0, 3, 1, 4, 2]);
        after *= mode;
        state = next.reshape([before, rank * rank * after]);
    }
    let matrix = first.val().permute([1, 3, 2, 0]).reshape([mode * rank * rank, mode]);
    let columns = state.reshape([rows, mode * rank * rank, after]).swap_dims(1, 2);
    let next = linear(columns.reshape([rows * after, mode * rank * rank]), matrix);
    next.reshape([rows, after, mode]).swap_dims(1, 2).reshape([rows, d_in])
}
