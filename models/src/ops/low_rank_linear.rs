//! A linear layer with a low-rank product beside it.

use burn::tensor::Tensor;

/// `y = x W + scale (x A) B`: `x [rows, d_in]`, `W [d_in, d_out]`, `A [d_in, rank]`, `B [rank, d_out]`.
///
/// On the CPU backend the whole is one operation that adds the product into the output of the weight, keeps only its inputs, and forms gradients of
/// those inputs alone that are tracked: with a frozen weight no dense gradient exists.
pub fn low_rank_linear(x: Tensor<2>, weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if [&x, &weight, &a, &b].into_iter().all(super::flex::fits) {
        return fused::low_rank_linear(x, weight, a, b, scale);
    }
    composed(x, weight, a, b, scale)
}

fn composed(x: Tensor<2>, weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
    x.clone().matmul(weight) + x.matmul(a).matmul(b).mul_scalar(scale)
}

#[cfg(feature = "flex")]
mod fused {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
    use burn::tensor::Tensor;
    use burn_flex::FlexTensor;

    use crate::ops::flex::{Matrix, contiguous, product, tensor, values};

    pub fn low_rank_linear(x: Tensor<2>, weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as LowRankLinearOp>::fused_low_rank_linear(
            x.into_dispatch(),
            weight.into_dispatch(),
            a.into_dispatch(),
            b.into_dispatch(),
            scale,
        ))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait LowRankLinearOp: Backend {
        fn fused_low_rank_linear(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            scale: f64,
        ) -> FloatTensor<Self>;
    }

    impl LowRankLinearOp for Flex {
        fn fused_low_rank_linear(
            x: FlexTensor,
            weight: FlexTensor,
            a: FlexTensor,
            b: FlexTensor,
            scale: f64,
        ) -> FlexTensor {
            forward(&[x, weight, a, b].map(contiguous), scale as f32)
        }
    }

    impl<C: CheckpointStrategy> LowRankLinearOp for Autodiff<Flex, C> {
        fn fused_low_rank_linear(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            scale: f64,
        ) -> FloatTensor<Self> {
            let nodes = [x.node(), weight.node(), a.node(), b.node()];
            let prepared = LowRankLinearBackward.prepare::<C>(nodes).compute_bound().stateful();
            let inputs = [x, weight, a, b].map(|input| contiguous(input.into_primitive()));
            let y = forward(&inputs, scale as f32);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((inputs, scale as f32), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct LowRankLinearBackward;

    impl Backward<Flex, 4> for LowRankLinearBackward {
        type State = ([FlexTensor; 4], f32);

        fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (inputs, scale) = ops.state;
            let wanted = [0, 1, 2, 3].map(|place| ops.parents[place].is_some());
            let slopes = backward(&inputs, scale, &dy, wanted);
            for (node, slope) in ops.parents.into_iter().zip(slopes) {
                if let (Some(node), Some(slope)) = (node, slope) {
                    grads.register::<Flex>(node.id, slope);
                }
            }
        }
    }

    fn size(x: &FlexTensor) -> [usize; 2] {
        [x.shape()[0], x.shape()[1]]
    }

    fn matrix(x: &FlexTensor) -> Matrix<&[f32]> {
        let [rows, columns] = size(x);
        Matrix::row_major(values(x), rows, columns)
    }

    /// `factor * left right` in fresh memory.
    fn multiplied(factor: f32, left: Matrix<&[f32]>, right: Matrix<&[f32]>) -> Vec<f32> {
        let (rows, columns) = (left.rows, right.columns);
        let mut out = vec![0.0; rows * columns];
        product(Matrix::row_major(&mut out[..], rows, columns), false, factor, left, right, true);
        out
    }

    fn forward([x, weight, a, b]: &[FlexTensor; 4], scale: f32) -> FlexTensor {
        let ([rows, _], [rank, d_out]) = (size(x), size(b));
        let mut y = multiplied(1.0, matrix(x), matrix(weight));
        let h = multiplied(scale, matrix(x), matrix(a));
        let h = Matrix::row_major(&h[..], rows, rank);
        product(Matrix::row_major(&mut y[..], rows, d_out), true, 1.0, h, matrix(b), true);
        tensor(y, [rows, d_out])
    }

    fn backward(
        [x, weight, a, b]: &[FlexTensor; 4],
        scale: f32,
        dy: &FlexTensor,
        [wants_x, wants_weight, wants_a, wants_b]: [bool; 4],
    ) -> [Option<FlexTensor>; 4] {
        let ([rows, d_in], [rank, d_out]) = (size(x), size(b));
        let db = wants_b.then(|| {
            // Cheaper to compute again than to keep.
            let h = multiplied(scale, matrix(x), matrix(a));
            tensor(multiplied(1.0, Matrix::row_major(&h[..], rows, rank).transposed(), matrix(dy)), [rank, d_out])
        });
        let (mut dx, mut da) = (None, None);
        if wants_a || wants_x {
            let dh = multiplied(scale, matrix(dy), matrix(b).transposed());
            let dh = Matrix::row_major(&dh[..], rows, rank);
            da = wants_a.then(|| tensor(multiplied(1.0, matrix(x).transposed(), dh), [d_in, rank]));
            dx = wants_x.then(|| {
                let mut dx = multiplied(1.0, matrix(dy), matrix(weight).transposed());
                let out = Matrix::row_major(&mut dx[..], rows, d_in);
                product(out, true, 1.0, dh, matrix(a).transposed(), true);
                tensor(dx, [rows, d_in])
            });
        }
        let dweight = wants_weight.then(|| tensor(multiplied(1.0, matrix(x).transposed(), matrix(dy)), [d_in, d_out]));
        [dx, dweight, da, db]
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};
    use burn::tensor::Tensor;

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for [rows, d_in, rank, d_out] in [[5, 7, 3, 4], [1, 16, 1, 33], [70, 20, 20, 9]] {
            let shapes = [[rows, d_in], [d_in, d_out], [d_in, rank], [rank, d_out]];
            let inputs: Vec<Vec<f32>> =
                shapes.iter().enumerate().map(|(seed, shape)| random(shape, seed as u64)).collect();
            let run = |form: fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, f64) -> Tensor<2>| {
                move |inputs: &[Tensor<1>]| {
                    let matrix = |place: usize| inputs[place].clone().reshape(shapes[place]);
                    form(matrix(0), matrix(1), matrix(2), matrix(3), 0.7).reshape([rows * d_out])
                }
            };
            Check::new(&inputs).equal(run(low_rank_linear), run(composed));
        }
    }
}
