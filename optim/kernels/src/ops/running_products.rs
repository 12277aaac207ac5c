//! Products of the first values of each row.

use burn::tensor::Tensor;

/// Products of the first 1, 2, ... values of each row of `x [rows, n]`; gradients are exact at zeros.
pub fn running_products(x: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) {
        return fused::running_products(x);
    }
    composed(x)
}

fn composed(x: Tensor<2>) -> Tensor<2> {
    let mut products: Vec<Tensor<2>> = Vec::with_capacity(x.dims()[1]);
    for place in 0..x.dims()[1] {
        let own = x.clone().narrow(1, place, 1);
        products.push(match products.last() {
            Some(before) => before.clone() * own,
            None => own,
        });
    }
    if products.is_empty() { x } else { Tensor::cat(products, 1) }
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

    use crate::ops::flex::{contiguous, tensor, values};

    pub fn running_products(x: Tensor<2>) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as RunningProductsOp>::fused_running_products(x.into_dispatch()))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait RunningProductsOp: Backend {
        fn fused_running_products(x: FloatTensor<Self>) -> FloatTensor<Self>;
    }

    impl RunningProductsOp for Flex {
        fn fused_running_products(x: FlexTensor) -> FlexTensor {
            forward(&contiguous(x))
        }
    }

    impl<C: CheckpointStrategy> RunningProductsOp for Autodiff<Flex, C> {
        fn fused_running_products(x: FloatTensor<Self>) -> FloatTensor<Self> {
            let prepared = RunningProductsBackward.prepare::<C>([x.node()]).compute_bound().stateful();
            let x = contiguous(x.into_primitive());
            let y = forward(&x);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish(x, y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct RunningProductsBackward;

    impl Backward<Flex, 1> for RunningProductsBackward {
        type State = FlexTensor;

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            if let [Some(node)] = ops.parents {
                grads.register::<Flex>(node.id, backward(&ops.state, &dy));
            }
        }
    }

    fn forward(x: &FlexTensor) -> FlexTensor {
        let mut y = values(x).to_vec();
        for row in y.chunks_mut(x.shape()[1].max(1)) {
            for place in 1..row.len() {
                row[place] *= row[place - 1];
            }
        }
        tensor(y, x.shape())
    }

    /// `dx_i` is the product before i times `dy_i + x_{i+1} (dy_{i+1} + x_{i+2} (dy_{i+2} + ...))`.
    fn backward(x: &FlexTensor, dy: &FlexTensor) -> FlexTensor {
        let width = x.shape()[1].max(1);
        let mut dx = values(dy).to_vec();
        for (row, x) in dx.chunks_mut(width).zip(values(x).chunks(width)) {
            for place in (1..row.len()).rev() {
                row[place - 1] += x[place] * row[place];
            }
            let mut before = 1.0;
            for (dx, x) in row.iter_mut().zip(x) {
                *dx *= before;
                before *= x;
            }
        }
        tensor(dx, x.shape())
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for ([rows, n], zero) in [([1, 1], None), ([1, 8], Some(3)), ([3, 4], None), ([3, 3], Some(0))] {
            let mut x = random(&[rows * n], 3);
            if let Some(place) = zero {
                x[place] = 0.0;
            }
            let flat = |form: fn(Tensor<2>) -> Tensor<2>| {
                move |inputs: &[Tensor<1>]| form(inputs[0].clone().reshape([rows, n])).reshape([rows * n])
            };
            let check = Check::new(&[x]);
            check.equal(flat(running_products), flat(composed));
            check.gradients(flat(composed));
        }
    }
}
