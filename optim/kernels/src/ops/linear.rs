//! A linear layer without bias.

use burn::tensor::{DType, Tensor};

/// `y = x W`: `x [rows, d_in]`, `W [d_in, d_out]`, each also as a transposed view.
///
/// Equal to `x.matmul(W)`, where `W` may also be in bf16, f16 or codes; its gradient is f32. On the CPU backend outputs and gradients are written to uninitialised memory, and every thread computes its part
/// of them independently.
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) && super::flex::fits_weight(&weight) {
        return fused::linear(x, weight);
    }
    composed(x, weight)
}

/// Matrix products through the kernels of this crate, where Burn's `matmul` goes through those of its backend.
pub trait MatrixProduct {
    /// `self other`, as [`linear`].
    fn times(self, other: Self) -> Self;
}

impl MatrixProduct for Tensor<2> {
    fn times(self, other: Self) -> Self {
        linear(self, other)
    }
}

fn composed(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    // Other types than f32 stay as they are.
    let weight = if x.dtype() == DType::F32 { super::widened(weight) } else { weight };
    x.matmul(weight)
}

#[cfg(feature = "flex")]
mod fused {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
    use burn::tensor::Tensor;
    use burn_flex::FlexTensor;

    use crate::ops::flex::tensor;
    use crate::ops::product::{Matrix, Operand, multiplied, readable};

    pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as LinearOp>::fused_linear(x.into_dispatch(), weight.into_dispatch()))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait LinearOp: Backend {
        fn fused_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
    }

    impl LinearOp for Flex {
        fn fused_linear(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
            let (x, weight) = (readable(x), readable(weight));
            times(Matrix::of(&x), Operand::of(&weight))
        }
    }

    impl<C: CheckpointStrategy> LinearOp for Autodiff<Flex, C> {
        fn fused_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
            let (x_learns, weight_learns) = (x.is_tracked(), weight.is_tracked());
            let prepared = LinearBackward.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
            let (x, weight) = (readable(x.into_primitive()), readable(weight.into_primitive()));
            let y = times(Matrix::of(&x), Operand::of(&weight));
            match prepared {
                // Each is kept for the gradient of the other.
                OpsKind::Tracked(prepared) => {
                    prepared.finish((weight_learns.then_some(x), x_learns.then_some(weight)), y)
                }
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct LinearBackward;

    impl Backward<Flex, 2> for LinearBackward {
        type State = (Option<FlexTensor>, Option<FlexTensor>);

        fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = readable(grads.consume::<Flex>(&ops.node));
            let (x, weight) = ops.state;
            let [x_node, weight_node] = ops.parents;
            if let (Some(node), Some(weight)) = (x_node, weight) {
                grads.register::<Flex>(node.id, times(Matrix::of(&dy), Operand::of(&weight).transposed()));
            }
            if let (Some(node), Some(x)) = (weight_node, x) {
                grads.register::<Flex>(node.id, times(Matrix::of(&x).transposed(), Matrix::of(&dy)));
            }
        }
    }

    fn times<'b>(a: Matrix<&[f32]>, b: impl Into<Operand<'b>>) -> FlexTensor {
        let b = b.into();
        tensor(multiplied(1.0, a, b), [a.rows, b.columns()])
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for [rows, d_in, d_out] in [[1, 1, 1], [5, 7, 3], [1, 16, 1030], [200, 33, 70], [64, 300, 9]] {
            for (x_turned, weight_turned) in [(false, false), (true, false), (false, true), (true, true)] {
                let run = |form: fn(Tensor<2>, Tensor<2>) -> Tensor<2>| {
                    let matrix = |x: &Tensor<1>, rows: usize, columns: usize, turned: bool| match turned {
                        true => x.clone().reshape([columns, rows]).transpose(),
                        false => x.clone().reshape([rows, columns]),
                    };
                    move |inputs: &[Tensor<1>]| {
                        let x = matrix(&inputs[0], rows, d_in, x_turned);
                        form(x, matrix(&inputs[1], d_in, d_out, weight_turned)).reshape([rows * d_out])
                    }
                };
                let check = Check::new(&[random(&[rows, d_in], 1), random(&[d_in, d_out], 2)]);
                check.equal(run(linear), run(composed));
                check.gradients(run(composed));
            }
        }
    }

    #[test]
    fn views_are_read_where_they_begin() {
        let x = Tensor::<2>::from_data([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], &Default::default());
        let part = x.clone().slice([1..3, 0..2]);
        let expected = part.clone().matmul(part.clone().transpose());
        linear(part.clone(), part.transpose()).into_data().assert_eq(&expected.into_data(), true);
        for part in [x.clone().slice([0..1, 0..3]), x.clone()] {
            let expected = part.clone().flip([0, 1]).matmul(x.clone());
            linear(part.flip([0, 1]), x.clone()).into_data().assert_eq(&expected.into_data(), true);
        }
        let column = x.slice([0..3, 1..2]);
        linear(column.clone().transpose(), column).into_data().assert_eq(&[[93.0f32]].into(), true);
    }
}
