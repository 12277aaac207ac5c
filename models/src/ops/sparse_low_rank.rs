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
    if [&x, &a, &b].into_iter().all(super::flex::fits) && super::flex::fits(&values) {
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
    x.clone().matmul(a).matmul(b).mul_scalar(scale) + x.matmul(sparse)
}

/// The sparse part as a matrix `[d_in, d_out]`.
pub fn sparse_matrix(values: Tensor<1>, positions: Tensor<1, Int>, [d_in, d_out]: [usize; 2]) -> Tensor<2> {
    let zeros = Tensor::<1>::zeros([d_in * d_out], &values.device());
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
    use rayon::prelude::*;

    use crate::ops::flex::{Matrix, contiguous, product, tensor, values, vectorised};

    /// Rows of `x` that one task takes: a cache line or more of each column.
    const CHUNK: usize = 64;

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
            let y = forward(&inputs, &positions, scale as f32);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((inputs, positions, scale as f32), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct SparseLowRankBackward;

    impl Backward<Flex, 4> for SparseLowRankBackward {
        type State = ([FlexTensor; 4], FlexTensor, f32);

        fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (inputs, positions, scale) = ops.state;
            let wanted = [0, 1, 2, 3].map(|place| ops.parents[place].is_some());
            let slopes = backward(&inputs, &positions, scale, &dy, wanted);
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

    /// `(output, input)` of every position.
    fn pairs(positions: &FlexTensor, d_in: usize) -> Vec<(u32, u32)> {
        match positions.as_slice::<i32>() {
            Some(positions) => {
                positions.iter().map(|place| (*place as u32 / d_in as u32, *place as u32 % d_in as u32)).collect()
            }
            None => unreachable!("positions were cast to i32"),
        }
    }

    /// `x A`, row-major.
    fn narrow(x: &FlexTensor, a: &FlexTensor) -> Vec<f32> {
        let ([rows, _], [_, rank]) = (size(x), size(a));
        let mut h = vec![0.0; rows * rank];
        product(Matrix::row_major(&mut h[..], rows, rank), false, 1.0, matrix(x), matrix(a), true);
        h
    }

    /// Adds to each sum the column that an entry `((from, to), value)` names, times its value.
    fn scatter<'a>(entries: impl Iterator<Item = ((u32, u32), &'a f32)>, columns: &[f32], sums: &mut [f32]) {
        sums.fill(0.0);
        vectorised(
            #[inline(always)]
            || {
                for ((from, to), value) in entries {
                    let (sum, column) = (lane_mut(sums, to), lane(columns, from));
                    sum.iter_mut().zip(column).for_each(|(sum, x)| *sum += value * x);
                }
            },
        );
    }

    fn forward([x, a, b, sparse]: &[FlexTensor; 4], positions: &FlexTensor, scale: f32) -> FlexTensor {
        let ([rows, d_in], [rank, d_out]) = (size(x), size(b));
        let h = narrow(x, a);
        let mut y = vec![0.0; rows * d_out];
        let h = Matrix::row_major(&h[..], rows, rank);
        product(Matrix::row_major(&mut y[..], rows, d_out), false, scale, h, matrix(b), true);
        let (pairs, sparse) = (pairs(positions, d_in), values(sparse));
        y.par_chunks_mut(CHUNK * d_out).zip(values(x).par_chunks(CHUNK * d_in)).for_each_init(
            || (vec![0.0; CHUNK * d_in], vec![0.0; CHUNK * d_out]),
            |(columns, sums), (y, x)| {
                to_columns(x, d_in, columns);
                scatter(pairs.iter().map(|(output, input)| (*input, *output)).zip(sparse), columns, sums);
                add_columns(sums, d_out, y);
            },
        );
        tensor(y, [rows, d_out])
    }

    fn backward(
        [x, a, b, sparse]: &[FlexTensor; 4],
        positions: &FlexTensor,
        scale: f32,
        dy: &FlexTensor,
        [wants_x, wants_a, wants_b, wants_sparse]: [bool; 4],
    ) -> [Option<FlexTensor>; 4] {
        let ([rows, d_in], [rank, d_out]) = (size(x), size(b));
        let db = wants_b.then(|| {
            // Cheaper to compute again than to keep.
            let h = narrow(x, a);
            let mut db = vec![0.0; rank * d_out];
            let h = Matrix::row_major(&h[..], rows, rank).transposed();
            product(Matrix::row_major(&mut db[..], rank, d_out), false, scale, h, matrix(dy), true);
            tensor(db, [rank, d_out])
        });
        let mut dx = vec![0.0; if wants_x { rows * d_in } else { 0 }];
        let mut da = None;
        if wants_a || wants_x {
            let mut dh = vec![0.0; rows * rank];
            let out = Matrix::row_major(&mut dh[..], rows, rank);
            product(out, false, scale, matrix(dy), matrix(b).transposed(), true);
            let dh = Matrix::row_major(&dh[..], rows, rank);
            if wants_x {
                let out = Matrix::row_major(&mut dx[..], rows, d_in);
                product(out, false, 1.0, dh, matrix(a).transposed(), true);
            }
            da = wants_a.then(|| {
                let mut da = vec![0.0; d_in * rank];
                let out = Matrix::row_major(&mut da[..], d_in, rank);
                product(out, false, 1.0, matrix(x).transposed(), dh, true);
                tensor(da, [d_in, rank])
            });
        }
        let (pairs, sparse) = (pairs(positions, d_in), values(sparse));
        let chunks = rows.div_ceil(CHUNK);
        let mut parts = vec![0.0; if wants_sparse { chunks * pairs.len() } else { 0 }];
        let task = |number: usize, dx: &mut [f32], part: &mut [f32], [inputs, outputs, sums]: &mut [Vec<f32>; 3]| {
            let (first, last) = (number * CHUNK, rows.min((number + 1) * CHUNK));
            to_columns(&values(dy)[first * d_out..last * d_out], d_out, outputs);
            if !dx.is_empty() {
                scatter(pairs.iter().copied().zip(sparse), outputs, sums);
                add_columns(sums, d_in, dx);
            }
            if !part.is_empty() {
                to_columns(&values(x)[first * d_in..last * d_in], d_in, inputs);
                vectorised(
                    #[inline(always)]
                    || {
                        for ((output, input), slope) in pairs.iter().zip(part) {
                            *slope = dot(lane(inputs, *input), lane(outputs, *output));
                        }
                    },
                );
            }
        };
        let memory = || [vec![0.0; CHUNK * d_in], vec![0.0; CHUNK * d_out], vec![0.0; CHUNK * d_in]];
        let count = pairs.len();
        match (wants_x, wants_sparse) {
            (true, true) => dx
                .par_chunks_mut(CHUNK * d_in)
                .zip(parts.par_chunks_mut(count))
                .enumerate()
                .for_each_init(memory, |memory, (number, (dx, part))| task(number, dx, part, memory)),
            (true, false) => dx
                .par_chunks_mut(CHUNK * d_in)
                .enumerate()
                .for_each_init(memory, |memory, (number, dx)| task(number, dx, &mut [], memory)),
            (false, true) => parts
                .par_chunks_mut(count)
                .enumerate()
                .for_each_init(memory, |memory, (number, part)| task(number, &mut [], part, memory)),
            (false, false) => {}
        }
        let dsparse = wants_sparse.then(|| {
            // In the order of the rows, whatever the threads did.
            let mut sums = vec![0.0; count];
            for part in parts.chunks(count) {
                sums.iter_mut().zip(part).for_each(|(sum, part): (&mut f32, &f32)| *sum += part);
            }
            tensor(sums, [count])
        });
        [wants_x.then(|| tensor(dx, [rows, d_in])), da, db, dsparse]
    }

    fn lane(columns: &[f32], place: u32) -> &[f32; CHUNK] {
        match columns[place as usize * CHUNK..][..CHUNK].as_array() {
            Some(lane) => lane,
            None => unreachable!("a lane has as many values as a chunk has rows"),
        }
    }

    fn lane_mut(columns: &mut [f32], place: u32) -> &mut [f32; CHUNK] {
        match columns[place as usize * CHUNK..][..CHUNK].as_mut_array() {
            Some(lane) => lane,
            None => unreachable!("a lane has as many values as a chunk has rows"),
        }
    }

    #[inline(always)]
    fn dot(a: &[f32; CHUNK], b: &[f32; CHUNK]) -> f32 {
        let mut sums = [0f32; 16];
        for (a, b) in a.as_chunks::<16>().0.iter().zip(b.as_chunks::<16>().0) {
            for lane in 0..16 {
                sums[lane] += a[lane] * b[lane];
            }
        }
        sums.iter().sum()
    }

    /// Rows of `width` values as columns of `CHUNK`; missing rows are zero.
    fn to_columns(rows: &[f32], width: usize, columns: &mut [f32]) {
        let count = rows.len() / width;
        if count < CHUNK {
            columns.fill(0.0);
        }
        // In tiles, so that both sides stay in the cache.
        for first in (0..width).step_by(16) {
            let last = width.min(first + 16);
            for (number, row) in rows.chunks_exact(width).enumerate() {
                for (column, x) in row[first..last].iter().enumerate() {
                    columns[(first + column) * CHUNK + number] = *x;
                }
            }
        }
    }

    fn add_columns(columns: &[f32], width: usize, rows: &mut [f32]) {
        for first in (0..width).step_by(16) {
            let last = width.min(first + 16);
            for (number, row) in rows.chunks_exact_mut(width).enumerate() {
                for (column, x) in row[first..last].iter_mut().enumerate() {
                    *x += columns[(first + column) * CHUNK + number];
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::ops::check::{Check, random};
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
                        let y = form(matrix(0), matrix(1), matrix(2), inputs[3].clone(), index.clone(), 0.7);
                        y.reshape([rows * d_out])
                    }
                };
                Check::new(&inputs).equal(run(sparse_low_rank), run(super::super::composed));
            }
        }
    }
}
