//! Root-mean-square norm.

use burn::tensor::Tensor;

/// RMS norm over the last dimension: `x / sqrt(mean(x^2) + eps) * gain`.
///
/// "Root Mean Square Layer Normalization" (arXiv 1910.07467). `gain [d]`, `x [.., d]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, gain: Tensor<1>, eps: f64) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) && super::flex::fits(&gain) {
        return fused::rms_norm(x, gain, eps);
    }
    composed(x, gain, eps)
}

fn composed<const D: usize>(x: Tensor<D>, gain: Tensor<1>, eps: f64) -> Tensor<D> {
    let scale = x.clone().square().mean_dim(D - 1).add_scalar(eps).sqrt().recip();
    x * scale * gain.unsqueeze()
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

    use crate::ops::flex::{Cleared, ROWS, contiguous, tensor, values, vectorised};

    pub fn rms_norm<const D: usize>(x: Tensor<D>, gain: Tensor<1>, eps: f64) -> Tensor<D> {
        Tensor::from_dispatch(<Dispatch as RmsNormOp>::fused_rms_norm(x.into_dispatch(), gain.into_dispatch(), eps))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait RmsNormOp: Backend {
        fn fused_rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, eps: f64) -> FloatTensor<Self>;
    }

    impl RmsNormOp for Flex {
        fn fused_rms_norm(x: FlexTensor, gain: FlexTensor, eps: f64) -> FlexTensor {
            forward(&contiguous(x), &contiguous(gain), eps).0
        }
    }

    impl<C: CheckpointStrategy> RmsNormOp for Autodiff<Flex, C> {
        fn fused_rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
            let prepared = RmsNormBackward.prepare::<C>([x.node(), gain.node()]).compute_bound().stateful();
            let (x, gain) = (contiguous(x.into_primitive()), contiguous(gain.into_primitive()));
            let (y, scales) = forward(&x, &gain, eps);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((x, gain, scales), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct RmsNormBackward;

    impl Backward<Flex, 2> for RmsNormBackward {
        type State = (FlexTensor, FlexTensor, Vec<f32>);

        fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let [x_node, gain_node] = ops.parents;
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (x, gain, scales) = ops.state;
            let (dx, dgain) = backward(&x, &gain, &scales, &dy);
            if let Some(node) = x_node {
                grads.register::<Flex>(node.id, dx);
            }
            if let Some(node) = gain_node {
                grads.register::<Flex>(node.id, dgain);
            }
        }
    }

    /// The norm, and `1 / sqrt(mean(x^2) + eps)` of every row.
    fn forward(x: &FlexTensor, gain: &FlexTensor, eps: f64) -> (FlexTensor, Vec<f32>) {
        let (source, gain) = (values(x), values(gain));
        let width = gain.len();
        let mut y = Cleared::new(source.len());
        let mut scales = vec![0.0; source.len() / width];
        y.parts(ROWS * width).zip(source.par_chunks(ROWS * width)).zip(scales.par_chunks_mut(ROWS)).for_each(
            |((y, x), scales)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for ((y, x), scale) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(&mut *scales) {
                            let mean = dot(x, x) / width as f32;
                            *scale = 1.0 / (mean + eps as f32).sqrt();
                            for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
                                *y = x * *scale * gain;
                            }
                        }
                    },
                );
            },
        );
        (tensor(y.into_values(), x.shape()), scales)
    }

    /// With `u = dy * gain`: `dx = scale * (u - x * scale^2 * mean(u x))`, `dgain = sum over rows of dy * x * scale`.
    fn backward(x: &FlexTensor, gain: &FlexTensor, scales: &[f32], dy: &FlexTensor) -> (FlexTensor, FlexTensor) {
        let (source, gains, upstream) = (values(x), values(gain), values(dy));
        let width = gains.len();
        let mut dx = Cleared::new(source.len());
        let partial: Vec<Vec<f32>> = dx
            .parts(ROWS * width)
            .zip(source.par_chunks(ROWS * width))
            .zip(upstream.par_chunks(ROWS * width))
            .zip(scales.par_chunks(ROWS))
            .map(|(((dx, x), dy), scales)| {
                let mut dgain = vec![0.0; width];
                vectorised(
                    #[inline(always)]
                    || {
                        let rows = dx
                            .chunks_exact_mut(width)
                            .zip(x.chunks_exact(width))
                            .zip(dy.chunks_exact(width))
                            .zip(scales);
                        for (((dx, x), dy), scale) in rows {
                            for (((u, dy), gain), (dgain, x)) in
                                dx.iter_mut().zip(dy).zip(gains).zip(dgain.iter_mut().zip(x))
                            {
                                *u = dy * gain;
                                *dgain += dy * x * scale;
                            }
                            let pull = dot(dx, x) / width as f32 * scale * scale;
                            for (dx, x) in dx.iter_mut().zip(x) {
                                *dx = scale * (*dx - x * pull);
                            }
                        }
                    },
                );
                dgain
            })
            .collect();
        let mut dgain = vec![0.0; width];
        for part in partial {
            for (sum, value) in dgain.iter_mut().zip(part) {
                *sum += value;
            }
        }
        (tensor(dx.into_values(), x.shape()), tensor(dgain, gain.shape()))
    }

    /// Sum of products in sixteen lanes, since the order of additions of floating-point numbers is never changed by the compiler.
    #[inline(always)]
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let ((a_lanes, a_rest), (b_lanes, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
        let mut sums = [0.0f32; 16];
        for (a, b) in a_lanes.iter().zip(b_lanes) {
            for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum = a.mul_add(*b, *sum);
            }
        }
        sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for shape in [[1, 1, 5], [2, 3, 7], [3, 50, 33], [1, 130, 16], [2, 2, 1000]] {
            for scale in [1.0, 1e-4, 1e4] {
                let x = random(&shape, 1).into_iter().map(|x| x * scale).collect();
                let form =
                    |x: &[Tensor<1>]| composed(x[0].clone().reshape(shape), x[1].clone(), 1e-6).flatten::<1>(0, 2);
                let check = Check::new(&[x, random(&[shape[2]], 2)]);
                check.equal(|x| rms_norm(x[0].clone().reshape(shape), x[1].clone(), 1e-6).flatten::<1>(0, 2), form);
                if scale == 1.0 {
                    check.gradients(form);
                }
            }
        }
    }
}
