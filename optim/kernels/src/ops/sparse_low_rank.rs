//! The product with a sparse plus low-rank weight.

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

/// `y = scale * x A B + x S`: `x [rows, d_in]`, `A [d_in, rank]`, `B [rank, d_out]`; `S [d_in, d_out]` has `values` at the positions
/// `output * d_in + input`, which are ascending and different.
///
/// On the CPU backend neither the dense weight nor its gradient is ever formed, and nothing but the inputs is kept for the backward pass.
pub fn sparse_low_rank(
    x: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    values: Tensor<1>,
    positions: Tensor<1, Int>,
    scale: f64,
) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) && [&a, &b].into_iter().all(super::flex::fits_weight) && super::flex::fits(&values) {
        return fused::sparse_low_rank(x, a, b, values, positions, scale);
    }
    composed(x, a, b, values, positions, scale)
}

fn composed(
    x: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    values: Tensor<1>,
    positions: Tensor<1, Int>,
    scale: f64,
) -> Tensor<2> {
    let shape = [a.dims()[0], b.dims()[1]];
    let sparse = sparse_matrix(values, positions, shape);
    x.clone().matmul(super::widened(a)).matmul(super::widened(b)).mul_scalar(scale) + x.matmul(sparse)
}

/// The sparse part as a matrix `[d_in, d_out]`.
pub fn sparse_matrix(values: Tensor<1>, positions: Tensor<1, Int>, [d_in, d_out]: [usize; 2]) -> Tensor<2> {
    let zeros = Tensor::<1>::zeros([d_in * d_out], (&values.device(), values.dtype()));
    zeros.scatter(0, positions, values, IndexingUpdateOp::Add).reshape([d_out, d_in]).transpose()
}

#[cfg(feature = "flex")]
mod fused {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::{FloatTensor, IntTensor};
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
    use burn::tensor::{DType, Int, Tensor};
    use burn_flex::FlexTensor;

    use crate::ops::flex::{contiguous, tensor, values, whole_numbers};
    use crate::ops::product::{Matrix, Operand, multiplied};
    use crate::ops::sparse_product::{Sparse, add_product, add_slopes};

    pub fn sparse_low_rank(
        x: Tensor<2>,
        a: Tensor<2>,
        b: Tensor<2>,
        sparse: Tensor<1>,
        positions: Tensor<1, Int>,
        scale: f64,
    ) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as SparseLowRankOp>::fused_sparse_low_rank(
            x.into_dispatch(),
            a.into_dispatch(),
            b.into_dispatch(),
            sparse.into_dispatch(),
            positions.cast(DType::I32).into_dispatch(),
            scale,
        ))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait SparseLowRankOp: Backend {
        fn fused_sparse_low_rank(
            x: FloatTensor<Self>,
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            sparse: FloatTensor<Self>,
            positions: IntTensor<Self>,
            scale: f64,
        ) -> FloatTensor<Self>;
    }

    impl SparseLowRankOp for Flex {
        fn fused_sparse_low_rank(
            x: FlexTensor,
            a: FlexTensor,
            b: FlexTensor,
            sparse: FlexTensor,
            positions: FlexTensor,
            scale: f64,
        ) -> FlexTensor {
            let inputs = [x, a, b, sparse].map(contiguous);
            forward(&inputs, &contiguous(positions), scale as f32)
        }
    }

    impl<C: CheckpointStrategy> SparseLowRankOp for Autodiff<Flex, C> {
        fn fused_sparse_low_rank(
            x: FloatTensor<Self>,
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            sparse: FloatTensor<Self>,
            positions: IntTensor<Self>,
            scale: f64,
        ) -> FloatTensor<Self> {
            let nodes = [x.node(), a.node(), b.node(), sparse.node()];
            let prepared = SparseLowRankBackward.prepare::<C>(nodes).compute_bound().stateful();
            let inputs = [x, a, b, sparse].map(|input| contiguous(input.into_primitive()));
            let positions = contiguous(positions);
            let scale = scale as f32;
            let y = forward(&inputs, &positions, scale);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish(Kept { inputs, positions, scale }, y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    /// Tensors kept for the backward pass.
    #[derive(Clone, Debug)]
    struct Kept {
        inputs: [FlexTensor; 4],
        positions: FlexTensor,
        scale: f32,
    }

    #[derive(Debug)]
    struct SparseLowRankBackward;

    impl Backward<Flex, 4> for SparseLowRankBackward {
        type State = Kept;

        fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let wanted = [0, 1, 2, 3].map(|place| ops.parents[place].is_some());
            let gradients = ops.state.gradients(&dy, wanted);
            for (node, gradient) in ops.parents.into_iter().zip(gradients) {
                if let (Some(node), Some(gradient)) = (node, gradient) {
                    grads.register::<Flex>(node.id, gradient);
                }
            }
        }
    }

    /// The sparse part, by outputs.
    fn sparse_part(sparse: &FlexTensor, positions: &FlexTensor, shape: [usize; 2]) -> Sparse {
        Sparse::by_outputs(whole_numbers(positions), values(sparse), shape)
    }

    fn forward([x, a, b, sparse]: &[FlexTensor; 4], positions: &FlexTensor, scale: f32) -> FlexTensor {
        let (rows, d_in, rank, d_out) = (x.shape()[0], x.shape()[1], b.shape()[0], b.shape()[1]);
        let h = multiplied(scale, Matrix::of(x), Operand::of(a));
        let mut y = multiplied(1.0, Matrix::row_major(&h[..], rows, rank), Operand::of(b));
        add_product(&sparse_part(sparse, positions, [d_in, d_out]), values(x), d_in, &mut y);
        tensor(y, [rows, d_out])
    }

    impl Kept {
        /// Gradients of x, A, B and the sparse values.
        fn gradients(
            &self,
            dy: &FlexTensor,
            [wants_x, wants_a, wants_b, wants_sparse]: [bool; 4],
        ) -> [Option<FlexTensor>; 4] {
            let Self { inputs: [x, a, b, sparse], positions, scale } = self;
            let (rows, d_in, rank, d_out) = (x.shape()[0], x.shape()[1], b.shape()[0], b.shape()[1]);
            let db = wants_b.then(|| {
                // Recomputed: keeping it would take `rank` elements per row and layer.
                let h = multiplied(*scale, Matrix::of(x), Operand::of(a));
                let h = Matrix::row_major(&h[..], rows, rank).transposed();
                tensor(multiplied(1.0, h, Matrix::of(dy)), [rank, d_out])
            });
            let (mut dx, mut da) = (None, None);
            if wants_a || wants_x {
                let dh = multiplied(*scale, Matrix::of(dy), Operand::of(b).transposed());
                let dh = Matrix::row_major(&dh[..], rows, rank);
                dx = wants_x.then(|| multiplied(1.0, dh, Operand::of(a).transposed()));
                da = wants_a.then(|| tensor(multiplied(1.0, Matrix::of(x).transposed(), dh), [d_in, rank]));
            }
            let mut dsparse = None;
            if wants_x || wants_sparse {
                let (by_inputs, places) = sparse_part(sparse, positions, [d_in, d_out]).turned(d_in);
                let x = wants_sparse.then(|| values(x));
                dsparse = add_slopes(&by_inputs, values(dy), d_out, dx.as_deref_mut(), x).map(|gradients| {
                    let mut ordered = vec![0.0; gradients.len()];
                    places.iter().zip(gradients).for_each(|(place, gradient)| ordered[*place as usize] = gradient);
                    tensor(ordered, [places.len()])
                });
            }
            [dx.map(|dx| tensor(dx, [rows, d_in])), da, db, dsparse]
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::ops::check::{Check, device, random};
        use burn::tensor::{Device, TensorData};

        #[test]
        fn equals_the_dense_formula() {
            for (rows, d_in, rank, d_out, positions) in [
                (70, 20, 4, 33, vec![0, 5, 19, 20, 61, 400, 659]),
                (3, 7, 7, 5, vec![34]),
                (64, 17, 1, 40, (0..680).step_by(3).collect()),
            ] {
                let count = positions.len();
                let shapes = [[rows, d_in], [d_in, rank], [rank, d_out]];
                let mut inputs: Vec<Vec<f32>> =
                    shapes.iter().enumerate().map(|(seed, shape)| random(shape, seed as u64)).collect();
                inputs.push(random(&[count], 9));
                let index = Tensor::<1, Int>::from_data(TensorData::new(positions, [count]), &Device::default());
                let run = |form: fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<1>, Tensor<1, Int>, f64) -> Tensor<2>| {
                    let index = index.clone();
                    move |inputs: &[Tensor<1>]| {
                        let matrix = |place: usize| inputs[place].clone().reshape(shapes[place]);
                        let y = form(
                            matrix(0),
                            matrix(1),
                            matrix(2),
                            inputs[3].clone(),
                            index.clone().to_device(&device(inputs)),
                            0.7,
                        );
                        y.reshape([rows * d_out])
                    }
                };
                let check = Check::new(&inputs);
                check.equal(run(super::super::sparse_low_rank), run(super::super::composed));
                check.gradients(run(super::super::composed));
            }
        }
    }
}
