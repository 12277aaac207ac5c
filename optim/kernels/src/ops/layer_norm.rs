//! Layer norm.

use burn::tensor::Tensor;

/// Layer norm over the last dimension: `(x - mean) / sqrt(variance + eps) * gain + bias`.
///
/// "Layer Normalization" (arXiv 1607.06450). `gain [d]`, `bias [d]`, `x [.., d]`; the variance divides by `d`.
pub fn layer_norm<const D: usize>(x: Tensor<D>, gain: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) && super::flex::fits(&gain) && super::flex::fits(&bias) {
        return fused::layer_norm(x, gain, bias, eps);
    }
    composed(x, gain, bias, eps)
}

fn composed<const D: usize>(x: Tensor<D>, gain: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let scale = centred.clone().square().mean_dim(D - 1).add_scalar(eps).sqrt().recip();
    centred * scale * gain.unsqueeze() + bias.unsqueeze()
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

    pub fn layer_norm<const D: usize>(x: Tensor<D>, gain: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
        let (x, gain, bias) = (x.into_dispatch(), gain.into_dispatch(), bias.into_dispatch());
        Tensor::from_dispatch(<Dispatch as LayerNormOp>::fused_layer_norm(x, gain, bias, eps))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait LayerNormOp: Backend {
        fn fused_layer_norm(
            x: FloatTensor<Self>,
            gain: FloatTensor<Self>,
            bias: FloatTensor<Self>,
            eps: f64,
        ) -> FloatTensor<Self>;
    }

    impl LayerNormOp for Flex {
        fn fused_layer_norm(x: FlexTensor, gain: FlexTensor, bias: FlexTensor, eps: f64) -> FlexTensor {
            forward(&contiguous(x), &contiguous(gain), &contiguous(bias), eps).0
        }
    }

    impl<C: CheckpointStrategy> LayerNormOp for Autodiff<Flex, C> {
        fn fused_layer_norm(
            x: FloatTensor<Self>,
            gain: FloatTensor<Self>,
            bias: FloatTensor<Self>,
            eps: f64,
        ) -> FloatTensor<Self> {
            let nodes = [x.node(), gain.node(), bias.node()];
            let prepared = LayerNormBackward.prepare::<C>(nodes).compute_bound().stateful();
            let (x, gain) = (contiguous(x.into_primitive()), contiguous(gain.into_primitive()));
            let (y, rows) = forward(&x, &gain, &contiguous(bias.into_primitive()), eps);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((x, gain, rows), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct LayerNormBackward;

    /// Mean and `1 / sqrt(variance + eps)` of a row.
    type Row = [f32; 2];

    impl Backward<Flex, 3> for LayerNormBackward {
        type State = (FlexTensor, FlexTensor, Vec<Row>);

        fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (x, gain, rows) = ops.state;
            for (node, grad) in ops.parents.into_iter().zip(backward(&x, &gain, &rows, &dy)) {
                if let Some(node) = node {
                    grads.register::<Flex>(node.id, grad);
                }
            }
        }
    }

    /// The norm, and the mean and scale of every row.
    fn forward(x: &FlexTensor, gain: &FlexTensor, bias: &FlexTensor, eps: f64) -> (FlexTensor, Vec<Row>) {
        let (source, gain, bias) = (values(x), values(gain), values(bias));
        let width = gain.len();
        let mut y = Cleared::new(source.len());
        let mut rows = vec![[0.0; 2]; source.len() / width];
        y.parts(ROWS * width).zip(source.par_chunks(ROWS * width)).zip(rows.par_chunks_mut(ROWS)).for_each(
            |((y, x), rows)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for ((y, x), row) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(&mut *rows) {
                            let mean = sum(x, |x| x) / width as f32;
                            let variance = sum(x, |x| (x - mean) * (x - mean)) / width as f32;
                            let scale = 1.0 / (variance + eps as f32).sqrt();
                            *row = [mean, scale];
                            for (((y, x), gain), bias) in y.iter_mut().zip(x).zip(gain).zip(bias) {
                                *y = (x - mean) * scale * gain + bias;
                            }
                        }
                    },
                );
            },
        );
        (tensor(y.into_values(), x.shape()), rows)
    }

    /// With `n = (x - mean) scale` and `u = dy gain`: `dx = scale (u - mean(u) - n mean(u n))`, and over all rows `dgain = sum dy n`,
    /// `dbias = sum dy`.
    fn backward(x: &FlexTensor, gain: &FlexTensor, rows: &[Row], dy: &FlexTensor) -> [FlexTensor; 3] {
        let (source, gains, upstream) = (values(x), values(gain), values(dy));
        let width = gains.len();
        let mut dx = Cleared::new(source.len());
        let partial: Vec<Vec<f32>> = dx
            .parts(ROWS * width)
            .zip(source.par_chunks(ROWS * width))
            .zip(upstream.par_chunks(ROWS * width))
            .zip(rows.par_chunks(ROWS))
            .map(|(((dx, x), dy), rows)| {
                let mut sums = vec![0.0; 2 * width];
                let (dgain, dbias) = sums.split_at_mut(width);
                vectorised(
                    #[inline(always)]
                    || {
                        let parts = dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width));
                        for (((dx, x), dy), [mean, scale]) in parts.zip(rows) {
                            for (i, u) in dx.iter_mut().enumerate() {
                                *u = dy[i] * gains[i];
                                dgain[i] += dy[i] * (x[i] - mean) * scale;
                                dbias[i] += dy[i];
                            }
                            let level = sum(dx, |u| u) / width as f32;
                            let pull = products(dx, x, *mean) / width as f32 * scale * scale;
                            for (dx, x) in dx.iter_mut().zip(x) {
                                *dx = scale * (*dx - level - (x - mean) * pull);
                            }
                        }
                    },
                );
                sums
            })
            .collect();
        let mut sums = vec![0.0; 2 * width];
        for part in partial {
            for (sum, value) in sums.iter_mut().zip(part) {
                *sum += value;
            }
        }
        let dbias = sums.split_off(width);
        [tensor(dx.into_values(), x.shape()), tensor(sums, gain.shape()), tensor(dbias, gain.shape())]
    }

    /// Sum of a function of the values in sixteen lanes, since the order of additions is never changed by the compiler.
    #[inline(always)]
    fn sum(x: &[f32], of: impl Fn(f32) -> f32) -> f32 {
        let (lanes, rest) = x.as_chunks::<16>();
        let mut sums = [0.0f32; 16];
        for lane in lanes {
            for (sum, x) in sums.iter_mut().zip(lane) {
                *sum += of(*x);
            }
        }
        sums.iter().sum::<f32>() + rest.iter().map(|x| of(*x)).sum::<f32>()
    }

    /// Sum of `u (x - mean)`, in sixteen lanes.
    #[inline(always)]
    fn products(u: &[f32], x: &[f32], mean: f32) -> f32 {
        let ((u_lanes, u_rest), (x_lanes, x_rest)) = (u.as_chunks::<16>(), x.as_chunks::<16>());
        let mut sums = [0.0f32; 16];
        for (u, x) in u_lanes.iter().zip(x_lanes) {
            for (sum, (u, x)) in sums.iter_mut().zip(u.iter().zip(x)) {
                *sum += u * (x - mean);
            }
        }
        sums.iter().sum::<f32>() + u_rest.iter().zip(x_rest).map(|(u, x)| u * (x - mean)).sum::<f32>()
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for shape in [[1, 1, 5], [2, 3, 7], [3, 50, 33], [1, 130, 16], [2, 2, 1000]] {
            for (scale, shift) in [(1.0, 0.0), (1e-4, 0.0), (1e4, 0.0), (1.0, 3.0)] {
                let x = random(&shape, 1).into_iter().map(|x| x * scale + shift).collect();
                let shaped = |x: &[Tensor<1>]| (x[0].clone().reshape(shape), x[1].clone(), x[2].clone());
                let form = |x: &[Tensor<1>]| {
                    let (x, gain, bias) = shaped(x);
                    composed(x, gain, bias, 1e-6).flatten::<1>(0, 2)
                };
                let check = Check::new(&[x, random(&[shape[2]], 2), random(&[shape[2]], 3)]);
                check.equal(
                    |x| {
                        let (x, gain, bias) = shaped(x);
                        layer_norm(x, gain, bias, 1e-6).flatten::<1>(0, 2)
                    },
                    form,
                );
                if scale == 1.0 {
                    check.gradients(form);
                }
            }
        }
    }
}
