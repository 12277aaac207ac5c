//! The product with a sum of low-rank matrices that are scaled by two sets of diagonals.

use burn::tensor::Tensor;

/// `x U`, or `x U^T` when `transposed`, with `U[k n + b, j] = lambda[k, b] a[k, j] gamma[b, j]` (`[rank n, d]`): `lambda [rank, n]`,
/// `gamma [n, d]`, `a [rank, d]`, which is not trained; `x [rows, rank n]`, or `[rows, d]`.
///
/// On the CPU backend `U` exists a block of rows at a time, forward and backward, and only the inputs are kept.
pub fn scaled_bases(x: Tensor<2>, lambda: Tensor<2>, gamma: Tensor<2>, a: Tensor<2>, transposed: bool) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if [&x, &lambda, &gamma, &a].into_iter().all(super::flex::fits) {
        return fused::scaled_bases(x, lambda, gamma, a, transposed);
    }
    composed(x, lambda, gamma, a, transposed)
}

fn composed(x: Tensor<2>, lambda: Tensor<2>, gamma: Tensor<2>, a: Tensor<2>, transposed: bool) -> Tensor<2> {
    let ([rank, n], [_, d]) = (lambda.dims(), gamma.dims());
    let u = lambda.reshape([rank, n, 1]) * a.reshape([rank, 1, d]) * gamma.reshape([1, n, d]);
    let u = u.reshape([rank * n, d]);
    x.matmul(if transposed { u.transpose() } else { u })
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

    use crate::ops::flex::{contiguous, tensor, values, vectorised};
    use crate::ops::product::{Matrix, product};

    /// Rows of `U` in memory at once.
    const BLOCK: usize = 256;

    pub fn scaled_bases(
        x: Tensor<2>,
        lambda: Tensor<2>,
        gamma: Tensor<2>,
        a: Tensor<2>,
        transposed: bool,
    ) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as ScaledBasesOp>::fused_scaled_bases(
            x.into_dispatch(),
            lambda.into_dispatch(),
            gamma.into_dispatch(),
            a.into_dispatch(),
            transposed,
        ))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait ScaledBasesOp: Backend {
        fn fused_scaled_bases(
            x: FloatTensor<Self>,
            lambda: FloatTensor<Self>,
            gamma: FloatTensor<Self>,
            a: FloatTensor<Self>,
            transposed: bool,
        ) -> FloatTensor<Self>;
    }

    impl ScaledBasesOp for Flex {
        fn fused_scaled_bases(
            x: FlexTensor,
            lambda: FlexTensor,
            gamma: FlexTensor,
            a: FlexTensor,
            transposed: bool,
        ) -> FlexTensor {
            forward(&[x, lambda, gamma, a].map(contiguous), transposed)
        }
    }

    impl<C: CheckpointStrategy> ScaledBasesOp for Autodiff<Flex, C> {
        fn fused_scaled_bases(
            x: FloatTensor<Self>,
            lambda: FloatTensor<Self>,
            gamma: FloatTensor<Self>,
            a: FloatTensor<Self>,
            transposed: bool,
        ) -> FloatTensor<Self> {
            let nodes = [x.node(), lambda.node(), gamma.node()];
            let prepared = ScaledBasesBackward.prepare::<C>(nodes).compute_bound().stateful();
            let inputs = [x, lambda, gamma, a].map(|input| contiguous(input.into_primitive()));
            let y = forward(&inputs, transposed);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((inputs, transposed), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct ScaledBasesBackward;

    impl Backward<Flex, 3> for ScaledBasesBackward {
        type State = ([FlexTensor; 4], bool);

        fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (inputs, transposed) = ops.state;
            let wanted = [0, 1, 2].map(|place| ops.parents[place].is_some());
            let gradients = backward(&inputs, transposed, &dy, wanted);
            for (node, gradient) in ops.parents.into_iter().zip(gradients) {
                if let (Some(node), Some(gradient)) = (node, gradient) {
                    grads.register::<Flex>(node.id, gradient);
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

    /// Columns of a row-major matrix.
    fn columns<T>(data: T, rows: usize, width: usize, count: usize) -> Matrix<T> {
        Matrix { data, rows, columns: count, row_stride: width, column_stride: 1 }
    }

    /// The three factors of a row of `U`.
    struct Row<'a> {
        lambda: f32,
        a: &'a [f32],
        gamma: &'a [f32],
    }

    /// The rows of `U` from one on.
    fn rows<'a>([_, lambda, gamma, a]: &'a [FlexTensor; 4], first: usize) -> impl Iterator<Item = Row<'a>> {
        let [n, d] = size(gamma);
        values(lambda).iter().enumerate().skip(first).map(move |(row, lambda)| Row {
            lambda: *lambda,
            a: &values(a)[row / n * d..][..d],
            gamma: &values(gamma)[row % n * d..][..d],
        })
    }

    /// Calls with the number of the first row, and the rows, of every block of `U`.
    fn blocks(inputs: &[FlexTensor; 4], mut act: impl FnMut(usize, Matrix<&[f32]>)) {
        let ([rank, n], [_, d]) = (size(&inputs[1]), size(&inputs[2]));
        let mut block = vec![0.0; BLOCK.min(rank * n) * d];
        for first in (0..rank * n).step_by(BLOCK) {
            let count = BLOCK.min(rank * n - first);
            vectorised(
                #[inline(always)]
                || {
                    for (out, row) in block[..count * d].chunks_exact_mut(d).zip(rows(inputs, first)) {
                        for ((u, a), gamma) in out.iter_mut().zip(row.a).zip(row.gamma) {
                            *u = row.lambda * a * gamma;
                        }
                    }
                },
            );
            act(first, Matrix::row_major(&block[..count * d], count, d));
        }
    }

    fn forward(inputs: &[FlexTensor; 4], transposed: bool) -> FlexTensor {
        let x = &inputs[0];
        let ([count, width], [rank, n], [_, d]) = (size(x), size(&inputs[1]), size(&inputs[2]));
        let outputs = if transposed { rank * n } else { d };
        let mut y = vec![0.0; count * outputs];
        blocks(inputs, |first, u| match transposed {
            true => {
                let part = columns(&mut y[first..], count, outputs, u.rows);
                product(part, false, 1.0, matrix(x), u.transposed(), true);
            }
            false => {
                let part = columns(&values(x)[first..], count, width, u.rows);
                product(Matrix::row_major(&mut y[..], count, d), first > 0, 1.0, part, u, true);
            }
        });
        tensor(y, [count, outputs])
    }

    fn backward(
        inputs: &[FlexTensor; 4],
        transposed: bool,
        dy: &FlexTensor,
        [wants_x, wants_lambda, wants_gamma]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let x = &inputs[0];
        let ([count, width], [rank, n], [_, d]) = (size(x), size(&inputs[1]), size(&inputs[2]));
        let mut dx = vec![0.0; if wants_x { count * width } else { 0 }];
        let (mut dlambda, mut dgamma) = (vec![0.0; rank * n], vec![0.0; n * d]);
        let mut du = vec![0.0; if wants_lambda || wants_gamma { BLOCK.min(rank * n) * d } else { 0 }];
        // The sides of width rank n, which meet the rows of U, and of width d.
        let (narrow, wide) = if transposed { (dy, x) } else { (x, dy) };
        blocks(inputs, |first, u| {
            let part = |x| columns(&values(x)[first..], count, rank * n, u.rows);
            match (wants_x, transposed) {
                (true, true) => {
                    product(Matrix::row_major(&mut dx[..], count, d), first > 0, 1.0, part(dy), u, true);
                }
                (true, false) => {
                    let out = columns(&mut dx[first..], count, width, u.rows);
                    product(out, false, 1.0, matrix(dy), u.transposed(), true);
                }
                (false, _) => {}
            }
            if du.is_empty() {
                return;
            }
            let out = Matrix::row_major(&mut du[..u.rows * d], u.rows, d);
            product(out, false, 1.0, part(narrow).transposed(), matrix(wide), true);
            vectorised(
                #[inline(always)]
                || {
                    for ((place, row), du) in (first..).zip(rows(inputs, first)).zip(du[..u.rows * d].chunks_exact(d)) {
                        let sums = &mut dgamma[place % n * d..][..d];
                        let mut lanes = [0f32; 16];
                        let inputs = row.a.chunks(16).zip(row.gamma.chunks(16)).zip(du.chunks(16));
                        for (((a, gamma), du), sums) in inputs.zip(sums.chunks_mut(16)) {
                            for lane in 0..a.len() {
                                let gradient = du[lane] * a[lane];
                                lanes[lane] += gradient * gamma[lane];
                                sums[lane] += gradient * row.lambda;
                            }
                        }
                        dlambda[place] = lanes.iter().sum();
                    }
                },
            );
        });
        [
            wants_x.then(|| tensor(dx, [count, width])),
            wants_lambda.then(|| tensor(dlambda, [rank, n])),
            wants_gamma.then(|| tensor(dgamma, [n, d])),
        ]
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, device, random};
    use burn::tensor::{Device, TensorData};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for ([count, rank, n, d], transposed) in
            [([5, 4, 3, 10], true), ([5, 4, 3, 10], false), ([70, 20, 20, 37], true), ([9, 20, 20, 37], false)]
        {
            let width = if transposed { d } else { rank * n };
            let outputs = if transposed { rank * n } else { d };
            let shapes = [[count, width], [rank, n], [n, d]];
            let inputs: Vec<Vec<f32>> =
                shapes.iter().enumerate().map(|(seed, shape)| random(shape, seed as u64)).collect();
            // Read from a wider matrix, as layers do that are smaller than others.
            let a =
                Tensor::<2>::from_data(TensorData::new(random(&[rank, d + 3], 9), [rank, d + 3]), &Device::default());
            let run = |form: fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, bool) -> Tensor<2>| {
                let a = a.clone().narrow(1, 0, d);
                move |inputs: &[Tensor<1>]| {
                    let matrix = |place: usize| inputs[place].clone().reshape(shapes[place]);
                    form(
                        matrix(0),
                        matrix(1),
                        matrix(2),
                        a.clone().cast(inputs[0].dtype()).to_device(&device(inputs)),
                        transposed,
                    )
                    .reshape([count * outputs])
                }
            };
            let check = Check::new(&inputs);
            check.equal(run(scaled_bases), run(composed));
            check.gradients(run(composed));
        }
    }
}
