//! The distance kernel in the memory of the CPU backend.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::kernel::DistanceKernel;
use super::select::{Lower, Upper, position};
use crate::ops::flex::{contiguous, exp, tensor, values, vectorised};
use crate::ops::product::{Matrix, product};

/// Rows of the matrix in memory at once.
const BLOCK: usize = 128;
/// Rows that one task of a count processes.
const ROWS: usize = 16;
/// Columns whose sums of squares are kept in registers.
const LANES: usize = 64;
/// Maxima and sums that run beside each other.
const SUMS: usize = 16;

pub fn matrix(p: Tensor<3>, q: Tensor<3>, mixture: Tensor<1>, kernel: DistanceKernel) -> Tensor<2> {
    let [p, q] = [p.into_dispatch(), q.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as DistanceKernelOp>::distance_matrix(p, q, mixture.into_dispatch(), kernel))
}

pub fn linear(x: Tensor<2>, p: Tensor<3>, q: Tensor<3>, mixture: Tensor<1>, kernel: DistanceKernel) -> Tensor<2> {
    let [x, p, q] = [x.into_dispatch(), p.into_dispatch(), q.into_dispatch()];
    Tensor::from_dispatch(<Dispatch as DistanceKernelOp>::distance_linear(x, p, q, mixture.into_dispatch(), kernel))
}

#[backend_extension(Flex, Autodiff)]
pub trait DistanceKernelOp: Backend {
    fn distance_matrix(
        p: FloatTensor<Self>,
        q: FloatTensor<Self>,
        mixture: FloatTensor<Self>,
        kernel: DistanceKernel,
    ) -> FloatTensor<Self>;

    fn distance_linear(
        x: FloatTensor<Self>,
        p: FloatTensor<Self>,
        q: FloatTensor<Self>,
        mixture: FloatTensor<Self>,
        kernel: DistanceKernel,
    ) -> FloatTensor<Self>;
}

impl DistanceKernelOp for Flex {
    fn distance_matrix(p: FlexTensor, q: FlexTensor, mixture: FlexTensor, kernel: DistanceKernel) -> FlexTensor {
        Points::new([p, q, mixture], kernel).matrix()
    }

    fn distance_linear(
        x: FlexTensor,
        p: FlexTensor,
        q: FlexTensor,
        mixture: FlexTensor,
        kernel: DistanceKernel,
    ) -> FlexTensor {
        Points::new([p, q, mixture], kernel).linear(&contiguous(x))
    }
}

impl<C: CheckpointStrategy> DistanceKernelOp for Autodiff<Flex, C> {
    fn distance_matrix(
        p: FloatTensor<Self>,
        q: FloatTensor<Self>,
        mixture: FloatTensor<Self>,
        kernel: DistanceKernel,
    ) -> FloatTensor<Self> {
        let nodes = [p.node(), q.node(), mixture.node()];
        let prepared = OfMatrix.prepare::<C>(nodes).compute_bound().stateful();
        let points = Points::new([p, q, mixture].map(|points| points.into_primitive()), kernel);
        let y = points.matrix();
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(points, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    fn distance_linear(
        x: FloatTensor<Self>,
        p: FloatTensor<Self>,
        q: FloatTensor<Self>,
        mixture: FloatTensor<Self>,
        kernel: DistanceKernel,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), p.node(), q.node(), mixture.node()];
        let prepared = OfLinear.prepare::<C>(nodes).compute_bound().stateful();
        let points = Points::new([p, q, mixture].map(|points| points.into_primitive()), kernel);
        let x = contiguous(x.into_primitive());
        let y = points.linear(&x);
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish((x, points), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}

#[derive(Debug)]
struct OfMatrix;

impl Backward<Flex, 3> for OfMatrix {
    type State = Points;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let (_, found) = ops.state.backward(None, &dy, false);
        for (node, grad) in ops.parents.into_iter().zip(found) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct OfLinear;

impl Backward<Flex, 4> for OfLinear {
    type State = (FlexTensor, Points);

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let (x, points) = ops.state;
        let [node_x, nodes @ ..] = ops.parents;
        let (dx, found) = points.backward(Some(&x), &dy, node_x.is_some());
        if let (Some(node), Some(dx)) = (node_x, dx) {
            grads.register::<Flex>(node.id, dx);
        }
        for (node, grad) in nodes.into_iter().zip(found) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, grad);
            }
        }
    }
}

/// The two lists of points, and the threshold once it is known.
#[derive(Clone, Debug)]
struct Points {
    kernel: DistanceKernel,
    p: FlexTensor,
    q: FlexTensor,
    mixture: [f32; 3],
    /// Coordinates of `q`, one after another: `[heads, k, m]`.
    columns: Vec<f32>,
    threshold: f64,
}

/// Rows of one block: the kernel, the softmax, and the matrix before it is made sparse.
struct Rows {
    kernel: Vec<f32>,
    soft: Vec<f32>,
    mixed: Vec<f32>,
}

impl Points {
    fn new(inputs: [FlexTensor; 3], kernel: DistanceKernel) -> Self {
        let [p, q, mixture] = inputs.map(contiguous);
        let [heads, m, k] = [0, 1, 2].map(|axis| q.shape()[axis]);
        let mut columns = vec![0.0; heads * m * k];
        for (row, point) in values(&q).chunks_exact(k).enumerate() {
            let (head, j) = (row / m, row % m);
            for (c, value) in point.iter().enumerate() {
                columns[(head * k + c) * m + j] = *value;
            }
        }
        let mut own = [0.0, 1.0, 0.0];
        if kernel.mixed {
            own.copy_from_slice(values(&mixture));
        }
        let mut points = Self { kernel, p, q, mixture: own, columns, threshold: 0.0 };
        points.threshold = points.find_threshold();
        points
    }

    /// Number of heads, rows, columns and coordinates.
    fn sizes(&self) -> [usize; 4] {
        let [heads, n, k] = [0, 1, 2].map(|axis| self.p.shape()[axis]);
        [heads, n, self.q.shape()[1], k]
    }

    /// Calls with the distances of a point of `p` from all of `q`, a chunk of columns at a time.
    #[inline(always)]
    fn distances(&self, head: usize, i: usize, mut act: impl FnMut(usize, &[f32])) {
        let [_, n, m, k] = self.sizes();
        let point = &values(&self.p)[(head * n + i) * k..][..k];
        for first in (0..m).step_by(LANES) {
            let count = LANES.min(m - first);
            let mut sums = [0f32; LANES];
            for (c, value) in point.iter().enumerate() {
                let column = &self.columns[(head * k + c) * m + first..][..count];
                for (sum, other) in sums[..count].iter_mut().zip(column) {
                    let difference = value - other;
                    *sum += difference * difference;
                }
            }
            sums[..count].iter_mut().for_each(|sum| *sum = sum.sqrt());
            act(first, &sums[..count]);
        }
    }

    /// Row `i` of the kernel, and with a mixture its softmax and the row of the mixed matrix.
    #[inline(always)]
    fn row(&self, i: usize, kernel: &mut [f32], soft: &mut [f32], mixed: &mut [f32]) {
        kernel.fill(0.0);
        for (head, coefficient) in self.kernel.coefficients.iter().enumerate() {
            self.distances(head, i, |first, distances| {
                for (sum, distance) in kernel[first..].iter_mut().zip(distances) {
                    *sum += coefficient * distance;
                }
            });
        }
        if !self.kernel.mixed {
            mixed.copy_from_slice(kernel);
            return;
        }
        let [a, t, b] = self.mixture;
        let inverse = 1.0 / t;
        let mut most = [f32::NEG_INFINITY; SUMS];
        for kernel in kernel.chunks(SUMS) {
            for (most, value) in most.iter_mut().zip(kernel) {
                let logit = value * inverse;
                *most = if logit > *most { logit } else { *most };
            }
        }
        let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let mut sums = [0f32; SUMS];
        for (powers, kernel) in soft.chunks_mut(SUMS).zip(kernel.chunks(SUMS)) {
            for ((power, value), sum) in powers.iter_mut().zip(kernel).zip(&mut sums) {
                *power = exp(value * inverse - most);
                *sum += *power;
            }
        }
        let sum: f64 = sums.into_iter().map(f64::from).sum();
        let share = (1.0 / sum) as f32;
        for ((out, power), value) in mixed.iter_mut().zip(soft.iter_mut()).zip(kernel.iter()) {
            *power *= share;
            *out = value + a * *power + b;
        }
    }

    /// Rows from `first` on, all threads together.
    fn rows(&self, first: usize, count: usize) -> Rows {
        let [_, _, m, _] = self.sizes();
        let zeros = || vec![0f32; count * m];
        let mut rows = Rows { kernel: zeros(), soft: zeros(), mixed: zeros() };
        let parts = rows.kernel.par_chunks_mut(m).zip(rows.soft.par_chunks_mut(m)).zip(rows.mixed.par_chunks_mut(m));
        parts.enumerate().for_each(|(row, ((kernel, soft), mixed))| {
            vectorised(
                #[inline(always)]
                || self.row(first + row, kernel, soft, mixed),
            );
        });
        rows
    }

    /// Counts the entries of all rows; the sums do not depend on their order.
    fn counted<T: Clone + Send + Sync>(&self, empty: T, add: fn(&mut T, &[f32]), plus: fn(T, &T) -> T) -> T {
        let [_, n, m, _] = self.sizes();
        let parts = (0..n.div_ceil(ROWS)).into_par_iter().fold(
            || empty.clone(),
            |mut counts, part| {
                let [mut kernel, mut soft, mut mixed] = [0, 1, 2].map(|_| vec![0f32; m]);
                for i in part * ROWS..n.min((part + 1) * ROWS) {
                    vectorised(
                        #[inline(always)]
                        || self.row(i, &mut kernel, &mut soft, &mut mixed),
                    );
                    add(&mut counts, &mixed);
                }
                counts
            },
        );
        parts.reduce(|| empty.clone(), |one, two| plus(one, &two))
    }

    fn find_threshold(&self) -> f64 {
        let Some(sparsify) = self.kernel.sparsify else { return 0.0 };
        let [_, n, m, _] = self.sizes();
        let position = position(n * m, sparsify.sparsity);
        let upper = self.counted(Upper::default(), Upper::add, |one, two| one.plus(two));
        let lower = self.counted(upper.around(position), Lower::add, |one, two| one.plus(two));
        lower.quantile(position)
    }

    /// Replaces entries by their factors of the sparse matrix: 0 for those that are dropped.
    fn factors(&self, rows: &Rows) -> Vec<f32> {
        match self.kernel.sparsify {
            None => vec![1.0; rows.mixed.len()],
            Some(sparsify) => {
                let factor = |value: &f32| match f64::from(value.abs()) > self.threshold {
                    true => sparsify.kept.factor(value.abs(), self.threshold),
                    false => 0.0,
                };
                rows.mixed.par_iter().with_min_len(1 << 14).map(factor).collect()
            }
        }
    }

    /// Calls with the number of the first row, the rows and their factors, of every block.
    fn blocks(&self, mut act: impl FnMut(usize, Rows, Vec<f32>)) {
        let [_, n, _, _] = self.sizes();
        for first in (0..n).step_by(BLOCK) {
            let rows = self.rows(first, BLOCK.min(n - first));
            let factors = self.factors(&rows);
            act(first, rows, factors);
        }
    }

    fn matrix(&self) -> FlexTensor {
        let [_, n, m, _] = self.sizes();
        let mut out = Vec::with_capacity(n * m);
        self.blocks(|_, rows, factors| {
            out.extend(rows.mixed.iter().zip(&factors).map(|(value, factor)| value * factor))
        });
        tensor(out, [n, m])
    }

    fn linear(&self, x: &FlexTensor) -> FlexTensor {
        let ([_, n, m, _], count) = (self.sizes(), x.shape()[0]);
        let mut y = vec![0.0; count * m];
        self.blocks(|first, rows, mut factors| {
            factors.iter_mut().zip(&rows.mixed).for_each(|(factor, value)| *factor *= value);
            let block = Matrix::row_major(&factors[..], factors.len() / m, m);
            let part = columns_of(&values(x)[first..], count, n, block.rows);
            product(Matrix::row_major(&mut y[..], count, m), first > 0, 1.0, part, block, true);
        });
        tensor(y, [count, m])
    }

    /// Gradients of `x`, and of the points and the mixture, for that of the output, or of the matrix if there is no `x`.
    fn backward(
        &self,
        x: Option<&FlexTensor>,
        dy: &FlexTensor,
        wants_x: bool,
    ) -> (Option<FlexTensor>, [FlexTensor; 3]) {
        let [heads, n, m, k] = self.sizes();
        let rows_of_x = x.map_or(0, |x| x.shape()[0]);
        let mut dx = vec![0.0; if wants_x { rows_of_x * n } else { 0 }];
        let (mut dp, mut dq) = (vec![0.0; heads * n * k], vec![0.0; heads * m * k]);
        let mut column_sums = vec![0f64; heads * m];
        let mut dmixture = [0f64; 3];
        self.blocks(|first, rows, factors| {
            let count = factors.len() / m;
            let mut slopes = match x {
                None => values(dy)[first * m..][..count * m].to_vec(),
                Some(x) => {
                    let mut slopes = vec![0.0; count * m];
                    let part = columns_of(&values(x)[first..], rows_of_x, n, count).transposed();
                    let dy = Matrix::row_major(values(dy), rows_of_x, m);
                    product(Matrix::row_major(&mut slopes[..], count, m), false, 1.0, part, dy, true);
                    slopes
                }
            };
            if wants_x {
                let sparse: Vec<f32> = rows.mixed.iter().zip(&factors).map(|(value, factor)| value * factor).collect();
                let out = columns_of(&mut dx[first..], rows_of_x, n, count);
                let dy = Matrix::row_major(values(dy), rows_of_x, m);
                product(out, false, 1.0, dy, Matrix::row_major(&sparse[..], count, m).transposed(), true);
            }
            slopes.iter_mut().zip(&factors).for_each(|(slope, factor)| *slope *= factor);
            if self.kernel.mixed {
                self.unmix(&rows, &mut slopes, &mut dmixture);
            }
            for head in 0..heads {
                let weights = self.weights(head, first, &slopes);
                let points = &values(&self.p)[(head * n + first) * k..][..count * k];
                let others = &values(&self.q)[head * m * k..][..m * k];
                let weights = Matrix::row_major(&weights[..], count, m);
                let out = &mut dp[(head * n + first) * k..][..count * k];
                let (all, these) = (Matrix::row_major(others, m, k), Matrix::row_major(points, count, k));
                product(Matrix::row_major(&mut out[..], count, k), false, -1.0, weights, all, true);
                for ((out, point), row) in out.chunks_mut(k).zip(points.chunks(k)).zip(weights.data.chunks(m)) {
                    let sum: f64 = row.iter().map(|weight| f64::from(*weight)).sum();
                    out.iter_mut().zip(point).for_each(|(out, value)| *out += sum as f32 * value);
                }
                let out = Matrix::row_major(&mut dq[head * m * k..][..m * k], m, k);
                product(out, first > 0, -1.0, weights.transposed(), these, true);
                for row in weights.data.chunks(m) {
                    let sums = column_sums[head * m..][..m].iter_mut();
                    sums.zip(row).for_each(|(sum, weight)| *sum += f64::from(*weight));
                }
            }
        });
        for ((slopes, point), sum) in dq.chunks_mut(k).zip(values(&self.q).chunks(k)).zip(column_sums) {
            slopes.iter_mut().zip(point).for_each(|(slope, value)| *slope += sum as f32 * value);
        }
        let dx = wants_x.then(|| tensor(dx, [rows_of_x, n]));
        let dmixture = dmixture.map(|slope| slope as f32).to_vec();
        (dx, [tensor(dp, [heads, n, k]), tensor(dq, [heads, m, k]), tensor(dmixture, [3])])
    }

    /// Turns gradients of mixed entries into those of the kernel, and adds to that of the mixture.
    fn unmix(&self, rows: &Rows, slopes: &mut [f32], dmixture: &mut [f64; 3]) {
        let m = self.q.shape()[1];
        let [a, t, _] = self.mixture.map(f64::from);
        let parts = slopes.par_chunks_mut(m).zip(rows.soft.par_chunks(m)).zip(rows.kernel.par_chunks(m));
        let sums: Vec<[f64; 3]> = parts
            .map(|((slopes, soft), kernel)| {
                let inner: f64 =
                    slopes.iter().zip(soft).map(|(slope, soft)| f64::from(*slope) * f64::from(*soft)).sum();
                let (mut all, mut by_t) = (0f64, 0f64);
                for ((slope, soft), kernel) in slopes.iter_mut().zip(soft).zip(kernel) {
                    all += f64::from(*slope);
                    let logit = a * f64::from(*soft) * (f64::from(*slope) - inner);
                    by_t -= logit * f64::from(*kernel) / (t * t);
                    *slope = (f64::from(*slope) + logit / t) as f32;
                }
                [inner, by_t, all]
            })
            .collect();
        for sum in sums {
            dmixture.iter_mut().zip(sum).for_each(|(total, part)| *total += part);
        }
    }

    /// Gradients of the kernel over the distances of one head, for rows from `first` on.
    fn weights(&self, head: usize, first: usize, slopes: &[f32]) -> Vec<f32> {
        let m = self.q.shape()[1];
        let coefficient = self.kernel.coefficients[head];
        let mut weights = vec![0f32; slopes.len()];
        weights.par_chunks_mut(m).zip(slopes.par_chunks(m)).enumerate().for_each(|(row, (weights, slopes))| {
            vectorised(
                #[inline(always)]
                || {
                    self.distances(head, first + row, |column, distances| {
                        let slopes = &slopes[column..][..distances.len()];
                        let out = &mut weights[column..][..distances.len()];
                        for ((out, slope), distance) in out.iter_mut().zip(slopes).zip(distances) {
                            *out = if *distance > 0.0 { coefficient * slope / distance } else { 0.0 };
                        }
                    });
                },
            );
        });
        weights
    }
}

/// Columns of a row-major matrix.
fn columns_of<T>(data: T, rows: usize, width: usize, count: usize) -> Matrix<T> {
    Matrix { data, rows, columns: count, row_stride: width, column_stride: 1 }
}
