//! Importance of a low-rank update: how much its elements move the loss.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::Tensor;

/// Sum of `|D * G|` over the elements of an update `D [d_in, d_out]` and of the gradient G of the loss with respect to
/// it, collected by the backward passes of [`scored`]. Clones share it.
///
/// One backward pass adds the sum block by block; neither D nor G exists as a whole. The sum over several backward passes,
/// as of micro-batches, needs the gradient of all of them together: with [`UpdateScore::collect`] it is kept,
/// `d_in d_out` values in f32.
#[derive(Clone, Default)]
pub struct UpdateScore(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    mode: Mode,
    sum: f64,
    gradient: Vec<f32>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Off,
    Sum,
    Gradient,
}

impl fmt::Debug for UpdateScore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpdateScore").finish_non_exhaustive()
    }
}

impl UpdateScore {
    /// Starts again, for a step of this many backward passes; 0 stops collecting.
    pub fn collect(&self, passes: u64) {
        let mode = match passes {
            0 => Mode::Off,
            1 => Mode::Sum,
            _ => Mode::Gradient,
        };
        *self.inner() = Inner { mode, ..Inner::default() };
    }

    /// Returns true if backward passes are collected.
    pub fn is_on(&self) -> bool {
        self.inner().mode != Mode::Off
    }

    /// The sum over the passes since [`UpdateScore::collect`], for the update `scale A B` that they had:
    /// `A [d_in, rank]`, `B [rank, d_out]`.
    pub fn sum(&self, factors: [Tensor<2>; 2], scale: f64) -> f64 {
        let inner = self.inner();
        let [a, b] = factors;
        match inner.mode {
            Mode::Gradient if !inner.gradient.is_empty() => {
                let update = a.without_autodiff().matmul(b.without_autodiff()).mul_scalar(scale);
                let update = crate::host::values(update);
                update.iter().zip(&inner.gradient).map(|(d, g)| f64::from((d * g).abs())).sum()
            }
            _ => inner.sum,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns `y [rows, d_out]` unchanged; its backward pass adds the importance of the update `scale A B` of `x [rows, d_in]`
/// to the score: `A [d_in, rank]`, `B [rank, d_out]`.
///
/// Collected on the CPU backend alone; elsewhere nothing is: see [`scores_on`].
pub fn scored(y: Tensor<2>, x: Tensor<2>, factors: [Tensor<2>; 2], scale: f64, score: &UpdateScore) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if super::flex::on_flex(&y.device()) {
        return fused::scored(y, x, factors, scale, score);
    }
    let _ = (x, factors, scale, score);
    y
}

/// Returns true if [`scored`] collects scores on this device.
pub fn scores_on(device: &burn::tensor::Device) -> bool {
    #[cfg(feature = "flex")]
    return super::flex::on_flex(device);
    #[cfg(not(feature = "flex"))]
    {
        let _ = device;
        false
    }
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
    use rayon::prelude::*;

    use super::{Mode, UpdateScore};
    use crate::ops::flex::{contiguous, values, vectorised};
    use crate::ops::product::{Matrix, multiplied};

    /// Rows of the gradient that exist at a time.
    const BLOCK: usize = 256;
    /// Sums that run beside each other.
    const LANES: usize = 16;

    pub fn scored(y: Tensor<2>, x: Tensor<2>, [a, b]: [Tensor<2>; 2], scale: f64, score: &UpdateScore) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as ScoredOp>::scored(
            y.into_dispatch(),
            x.detach().into_dispatch(),
            a.detach().into_dispatch(),
            b.detach().into_dispatch(),
            scale,
            score.clone(),
        ))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait ScoredOp: Backend {
        fn scored(
            y: FloatTensor<Self>,
            x: FloatTensor<Self>,
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            scale: f64,
            score: UpdateScore,
        ) -> FloatTensor<Self>;
    }

    impl ScoredOp for Flex {
        fn scored(
            y: FlexTensor,
            _x: FlexTensor,
            _a: FlexTensor,
            _b: FlexTensor,
            _scale: f64,
            _score: UpdateScore,
        ) -> FlexTensor {
            y
        }
    }

    impl<C: CheckpointStrategy> ScoredOp for Autodiff<Flex, C> {
        fn scored(
            y: FloatTensor<Self>,
            x: FloatTensor<Self>,
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            scale: f64,
            score: UpdateScore,
        ) -> FloatTensor<Self> {
            let prepared = ScoredBackward.prepare::<C>([y.node()]).compute_bound().stateful();
            let y = y.into_primitive();
            match prepared {
                OpsKind::Tracked(prepared) => {
                    let [x, a, b] = [x, a, b].map(|input| contiguous(input.into_primitive()));
                    prepared.finish(Kept { x, a, b, scale: scale as f32, score }, y)
                }
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    /// Inputs kept for the backward pass.
    #[derive(Clone, Debug)]
    struct Kept {
        x: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        scale: f32,
        score: UpdateScore,
    }

    #[derive(Debug)]
    struct ScoredBackward;

    impl Backward<Flex, 1> for ScoredBackward {
        type State = Kept;

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            ops.state.add(&dy);
            if let [Some(node)] = ops.parents {
                grads.register::<Flex>(node.id, dy);
            }
        }
    }

    impl Kept {
        fn add(&self, dy: &FlexTensor) {
            let Self { x, a, b, scale, score } = self;
            let (rows, d_in, rank, d_out) = (x.shape()[0], a.shape()[0], a.shape()[1], dy.shape()[1]);
            let mut inner = score.inner();
            if inner.mode == Mode::Gradient {
                let gradient = multiplied(1.0, Matrix::of(x).transposed(), Matrix::of(dy));
                match inner.gradient.is_empty() {
                    true => inner.gradient = gradient.to_vec(),
                    false => inner.gradient.iter_mut().zip(&gradient[..]).for_each(|(sum, value)| *sum += value),
                }
                return;
            }
            if rank == 0 {
                return;
            }
            for first in (0..d_in).step_by(BLOCK) {
                let count = BLOCK.min(d_in - first);
                let columns = Matrix {
                    data: &values(x)[first..],
                    rows: count,
                    columns: rows,
                    row_stride: 1,
                    column_stride: d_in,
                };
                let gradient = multiplied(1.0, columns, Matrix::of(dy));
                let of_inputs = values(a)[first * rank..][..count * rank].par_chunks(rank);
                let sums: Vec<f64> = gradient
                    .par_chunks(d_out)
                    .zip(of_inputs)
                    .map_init(|| vec![0.0; d_out], |update, (gradient, a)| magnitude(update, a, values(b), gradient))
                    .collect();
                inner.sum += f64::from(scale.abs()) * sums.iter().sum::<f64>();
            }
        }
    }

    /// Sum of `|d g|` over the elements of one row of the update, which is written to `update`, and of the gradient.
    fn magnitude(update: &mut [f32], a: &[f32], b: &[f32], gradient: &[f32]) -> f64 {
        let mut sums = [0f32; LANES];
        vectorised(
            #[inline(always)]
            || {
                update.fill(0.0);
                for (a, b) in a.iter().zip(b.chunks_exact(gradient.len())) {
                    for (d, b) in update.iter_mut().zip(b) {
                        *d += a * b;
                    }
                }
                for (update, gradient) in update.chunks(LANES).zip(gradient.chunks(LANES)) {
                    for ((sum, d), g) in sums.iter_mut().zip(update).zip(gradient) {
                        *sum += (d * g).abs();
                    }
                }
            },
        );
        sums.iter().map(|sum| f64::from(*sum)).sum()
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::host::values;
    use crate::ops::check::random;
    use burn::tensor::{Device, TensorData};

    fn matrix(shape: [usize; 2], seed: u64) -> Tensor<2> {
        Tensor::from_data(TensorData::new(random(&shape, seed), shape), &Device::default().autodiff())
    }

    #[test]
    fn the_sum_is_that_of_the_dense_update_and_its_gradient() {
        for [rows, d_in, rank, d_out] in [[5, 7, 2, 4], [1, 130, 3, 9], [20, 300, 1, 70]] {
            let [x, a, b] = [([rows, d_in], 1), ([d_in, rank], 2), ([rank, d_out], 3)].map(|(s, seed)| matrix(s, seed));
            let dy = matrix([rows, d_out], 4);
            let product = a.clone().matmul(b.clone()).mul_scalar(0.5).inner();
            let dense = (product * x.clone().transpose().matmul(dy.clone()).inner()).abs();
            let expected: f64 = values(dense).iter().map(|value| f64::from(*value)).sum();
            for passes in [1u64, 2] {
                let score = UpdateScore::default();
                score.collect(passes);
                let y = matrix([rows, d_out], 5).require_grad();
                for _ in 0..passes {
                    let scored = scored(y.clone(), x.clone(), [a.clone(), b.clone()], 0.5, &score);
                    let grads = (scored * dy.clone().div_scalar(passes as f64)).sum().backward();
                    let seen = values(y.grad(&grads).expect("y is tracked").mul_scalar(passes as f64));
                    assert_eq!(seen, values(dy.clone().inner()), "the gradient passes through");
                }
                let sum = score.sum([a.clone(), b.clone()], 0.5);
                assert!((sum - expected).abs() < 1e-5 * expected, "{sum} instead of {expected}");
            }
        }
    }
}
