//! A linear layer with an additional low-rank product.

use burn::tensor::Tensor;

/// `y = x W + scale (x A) B`: `x [rows, d_in]`, `W [d_in, d_out]`, `A [d_in, rank]`, `B [rank, d_out]`.
///
/// On the CPU backend the whole is one operation that adds the product into the output of the weight, keeps only its inputs and `x A` (not `x` with
/// frozen `W` and `A`), and forms gradients of those inputs alone that are tracked: with a frozen weight no dense gradient exists.
pub fn low_rank_linear(x: Tensor<2>, weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if [&x, &a, &b].into_iter().all(super::flex::fits) && super::flex::fits_weight(&weight) {
        return fused::low_rank_linear(x, weight, a, b, scale, None);
    }
    composed(x, weight, a, b, scale)
}

/// [`low_rank_linear`] with scale 1, with a learning-rate scale for each output: the gradients of A and B see the gradient of the output
/// multiplied by the scales `output_lr_scale [d_out]`. The output and the gradients of `x` and `W` do not depend on it, and it has no gradient.
pub fn lr_scaled_low_rank_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    output_lr_scale: Tensor<1>,
) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if [&x, &a, &b].into_iter().all(super::flex::fits)
        && super::flex::fits_weight(&weight)
        && super::flex::fits(&output_lr_scale)
    {
        return fused::low_rank_linear(x, weight, a, b, 1.0, Some(output_lr_scale));
    }
    x.clone().matmul(super::widened(weight)) + lr_scaled_product(x, a, b, output_lr_scale)
}

/// `(x A) B` of [`lr_scaled_low_rank_linear`].
pub fn lr_scaled_product(x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, output_lr_scale: Tensor<1>) -> Tensor<2> {
    let output_lr_scale = output_lr_scale.detach().unsqueeze::<2>();
    let learns = x.clone().detach().matmul(a.clone()).matmul(b.clone()) * output_lr_scale;
    // Zero, with the gradients of A and B.
    let learns = learns.clone() - learns.detach();
    x.matmul(a.detach()).matmul(b.detach()) + learns
}

fn composed(x: Tensor<2>, weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
    x.clone().matmul(super::widened(weight)) + x.matmul(a).matmul(b).mul_scalar(scale)
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

    use crate::host::values as host;
    use crate::ops::flex::{contiguous, tensor, values};
    use crate::ops::product::{Matrix, Operand, multiplied, product, readable};

    pub fn low_rank_linear(
        x: Tensor<2>,
        weight: Tensor<2>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
        output_lr_scale: Option<Tensor<1>>,
    ) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as LowRankLinearOp>::fused_low_rank_linear(
            x.into_dispatch(),
            weight.into_dispatch(),
            a.into_dispatch(),
            b.into_dispatch(),
            scale,
            output_lr_scale.map(host),
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
            output_lr_scale: Option<Vec<f32>>,
        ) -> FloatTensor<Self>;
    }

    impl LowRankLinearOp for Flex {
        fn fused_low_rank_linear(
            x: FlexTensor,
            weight: FlexTensor,
            a: FlexTensor,
            b: FlexTensor,
            scale: f64,
            _pace: Option<Vec<f32>>,
        ) -> FlexTensor {
            let ([x, a, b], weight) = ([x, a, b].map(contiguous), readable(weight));
            forward(&x, &weight, &a, &b, scale as f32).0
        }
    }

    impl<C: CheckpointStrategy> LowRankLinearOp for Autodiff<Flex, C> {
        fn fused_low_rank_linear(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            scale: f64,
            output_lr_scale: Option<Vec<f32>>,
        ) -> FloatTensor<Self> {
            let nodes = [x.node(), weight.node(), a.node(), b.node()];
            let [weight_learns, a_learns, b_learns] = [&weight, &a, &b].map(|input| input.is_tracked());
            let prepared = LowRankLinearBackward.prepare::<C>(nodes).compute_bound().stateful();
            let [x, a, b] = [x, a, b].map(|input| contiguous(input.into_primitive()));
            let weight = readable(weight.into_primitive());
            let (y, h) = forward(&x, &weight, &a, &b, scale as f32);
            match prepared {
                OpsKind::Tracked(prepared) => {
                    let kept = Kept {
                        x: (weight_learns || a_learns).then_some(x),
                        h: b_learns.then_some(h),
                        weight,
                        a,
                        b,
                        scale: scale as f32,
                        output_lr_scale,
                    };
                    prepared.finish(kept, y)
                }
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    /// Tensors kept for the backward pass.
    #[derive(Clone, Debug)]
    struct Kept {
        /// Present if the weight or A is trained.
        x: Option<FlexTensor>,
        /// `scale x A`, present if B is trained.
        h: Option<FlexTensor>,
        weight: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        scale: f32,
        output_lr_scale: Option<Vec<f32>>,
    }

    #[derive(Debug)]
    struct LowRankLinearBackward;

    impl Backward<Flex, 4> for LowRankLinearBackward {
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

    /// Multiplies each column with its factor.
    fn by_columns(values: &mut [f32], factors: &[f32]) {
        for row in values.chunks_exact_mut(factors.len()) {
            row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
        }
    }

    /// The output, and `scale x A`.
    fn forward(
        x: &FlexTensor,
        weight: &FlexTensor,
        a: &FlexTensor,
        b: &FlexTensor,
        scale: f32,
    ) -> (FlexTensor, FlexTensor) {
        let ([x, a, b], rows) = ([x, a, b].map(Matrix::of), x.shape()[0]);
        let mut y = multiplied(1.0, x, Operand::of(weight));
        let h = tensor(multiplied(scale, x, a), [rows, a.columns]);
        product(Matrix::row_major(&mut y[..], rows, b.columns), true, 1.0, Matrix::of(&h), b, true);
        (tensor(y, [rows, b.columns]), h)
    }

    impl Kept {
        /// Gradients of x, weight, A and B.
        fn gradients(
            &self,
            dy: &FlexTensor,
            [wants_x, wants_weight, wants_a, _]: [bool; 4],
        ) -> [Option<FlexTensor>; 4] {
            let Self { x, h, weight, a, b, scale, output_lr_scale } = self;
            let (scale, output_lr_scale) = (*scale, output_lr_scale.as_deref());
            let (rows, d_in, rank, d_out) = (dy.shape()[0], a.shape()[0], b.shape()[0], b.shape()[1]);
            let x = || match x {
                Some(x) => Matrix::of(x),
                None => unreachable!("x is kept where the weight or A learns"),
            };
            let db = h.as_ref().map(|h| {
                let mut db = multiplied(1.0, Matrix::of(h).transposed(), Matrix::of(dy));
                if let Some(output_lr_scale) = output_lr_scale {
                    by_columns(&mut db, output_lr_scale);
                }
                tensor(db, [rank, d_out])
            });
            let through = |b: &[f32]| multiplied(scale, Matrix::of(dy), Matrix::row_major(b, rank, d_out).transposed());
            // With learning-rate scales A sees another gradient than x does.
            let plain = (wants_x || (wants_a && output_lr_scale.is_none())).then(|| through(values(b)));
            let scaled = output_lr_scale.filter(|_| wants_a).map(|output_lr_scale| {
                let mut b = values(b).to_vec();
                by_columns(&mut b, output_lr_scale);
                through(&b)
            });
            let da = scaled.as_ref().or(plain.as_ref()).filter(|_| wants_a).map(|dh| {
                tensor(multiplied(1.0, x().transposed(), Matrix::row_major(&dh[..], rows, rank)), [d_in, rank])
            });
            let dx = plain.as_ref().filter(|_| wants_x).map(|dh| {
                let mut dx = multiplied(1.0, Matrix::of(dy), Operand::of(weight).transposed());
                let out = Matrix::row_major(&mut dx[..], rows, d_in);
                product(out, true, 1.0, Matrix::row_major(&dh[..], rows, rank), Matrix::of(a).transposed(), true);
                tensor(dx, [rows, d_in])
            });
            let dweight =
                wants_weight.then(|| tensor(multiplied(1.0, x().transposed(), Matrix::of(dy)), [d_in, d_out]));
            [dx, dweight, da, db]
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, device, random};
    use burn::tensor::TensorData;

    type Form = fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, Tensor<1>) -> Tensor<2>;

    /// Pairs of forms that must be equal, with or without learning-rate scales.
    const FORMS: [[Form; 2]; 2] = [
        [|x, w, a, b, _| low_rank_linear(x, w, a, b, 0.7), |x, w, a, b, _| composed(x, w, a, b, 0.7)],
        [lr_scaled_low_rank_linear, |x, w, a, b, output_lr_scale| {
            x.clone().matmul(w) + lr_scaled_product(x, a, b, output_lr_scale)
        }],
    ];

    #[test]
    fn the_fused_forms_equal_the_composed_ones() {
        for [rows, d_in, rank, d_out] in [[5, 7, 3, 4], [1, 16, 1, 33], [70, 20, 20, 9]] {
            let shapes = [[rows, d_in], [d_in, d_out], [d_in, rank], [rank, d_out]];
            let inputs: Vec<Vec<f32>> =
                shapes.iter().enumerate().map(|(seed, shape)| random(shape, seed as u64)).collect();
            for [fused, composed] in FORMS {
                let run = |form: Form| {
                    move |inputs: &[Tensor<1>]| {
                        let matrix = |place: usize| inputs[place].clone().reshape(shapes[place]);
                        let output_lr_scale = TensorData::new(random(&[d_out], 9), [d_out]);
                        let output_lr_scale = Tensor::from_data(output_lr_scale, &device(inputs).autodiff());
                        form(matrix(0), matrix(1), matrix(2), matrix(3), output_lr_scale).reshape([rows * d_out])
                    }
                };
                let check = Check::new(&inputs);
                check.equal(run(fused), run(composed));
                // With learning-rate scales gradients are not derivatives.
                check.gradients(run(|x, w, a, b, _| super::composed(x, w, a, b, 0.7)));
                // Weight and A frozen: what is kept is another matrix.
                let frozen = |form: Form| {
                    let run = run(form);
                    let (w, a) = (inputs[1].clone(), inputs[2].clone());
                    move |learning: &[Tensor<1>]| {
                        let plain = |values: &[f32]| {
                            let data = TensorData::new(values.to_vec(), [values.len()]);
                            Tensor::<1>::from_data(data, &device(learning).autodiff())
                        };
                        run(&[learning[0].clone(), plain(&w), plain(&a), learning[1].clone()])
                    }
                };
                Check::new(&[inputs[0].clone(), inputs[3].clone()]).equal(frozen(fused), frozen(composed));
            }
        }
    }
}
