//! Weights in f32.

use burn::tensor::{DType, Tensor};

/// The values of a weight `[d_in, d_out]` in f32, whatever its type; also of one in codes ([`crate::narrow`]). The gradient is that of
/// the result, not rounded to the type of the weight.
pub fn widened(weight: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if super::flex::on_flex(&weight.device()) && weight.dtype() != DType::F64 {
        return fused::widened(weight);
    }
    match weight.dtype() {
        DType::F64 => weight,
        _ => weight.cast(DType::F32),
    }
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

    use crate::ops::product::{readable, widened as wide};

    pub fn widened(weight: Tensor<2>) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as WidenedOp>::fused_widened(weight.into_dispatch()))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait WidenedOp: Backend {
        fn fused_widened(weight: FloatTensor<Self>) -> FloatTensor<Self>;
    }

    impl WidenedOp for Flex {
        fn fused_widened(weight: FlexTensor) -> FlexTensor {
            wide(&readable(weight))
        }
    }

    impl<C: CheckpointStrategy> WidenedOp for Autodiff<Flex, C> {
        fn fused_widened(weight: FloatTensor<Self>) -> FloatTensor<Self> {
            let prepared = WidenedBackward.prepare::<C>([weight.node()]).compute_bound().stateful();
            let values = wide(&readable(weight.into_primitive()));
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((), values),
                OpsKind::UnTracked(prepared) => prepared.finish(values),
            }
        }
    }

    #[derive(Debug)]
    struct WidenedBackward;

    impl Backward<Flex, 1> for WidenedBackward {
        type State = ();

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let gradient = grads.consume::<Flex>(&ops.node);
            if let [Some(node)] = ops.parents {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}
