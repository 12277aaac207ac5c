//! The gated linear unit of SwiGLU.

use burn::tensor::{Tensor, activation};

/// `silu(gate) * up`, element by element; both have the same shape.
///
/// "GLU Variants Improve Transformer" (arXiv 2002.05202).
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&gate) && super::flex::fits(&up) && gate.dims() == up.dims() {
        return fused::swiglu(gate, up);
    }
    composed(gate, up)
}

fn composed<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    activation::silu(gate) * up
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

    use crate::ops::flex::{Cleared, contiguous, exp, tensor, values, vectorised};

    /// Elements that one task processes.
    const CHUNK: usize = 1 << 14;

    pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
        Tensor::from_dispatch(<Dispatch as SwigluOp>::fused_swiglu(gate.into_dispatch(), up.into_dispatch()))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait SwigluOp: Backend {
        fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    }

    impl SwigluOp for Flex {
        fn fused_swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
            forward(&contiguous(gate), &contiguous(up))
        }
    }

    impl<C: CheckpointStrategy> SwigluOp for Autodiff<Flex, C> {
        fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
            let prepared = SwigluBackward.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful();
            let (gate, up) = (contiguous(gate.into_primitive()), contiguous(up.into_primitive()));
            let y = forward(&gate, &up);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((gate, up), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct SwigluBackward;

    impl Backward<Flex, 2> for SwigluBackward {
        type State = (FlexTensor, FlexTensor);

        fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let [gate_node, up_node] = ops.parents;
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (gate, up) = ops.state;
            let (dgate, dup) = backward(&gate, &up, &dy);
            if let Some(node) = gate_node {
                grads.register::<Flex>(node.id, dgate);
            }
            if let Some(node) = up_node {
                grads.register::<Flex>(node.id, dup);
            }
        }
    }

    #[inline(always)]
    fn sigmoid(x: f32) -> f32 {
        1.0 / (1.0 + exp(-x))
    }

    fn forward(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
        let (gates, ups) = (values(gate), values(up));
        let mut y = Cleared::new(gates.len());
        y.parts(CHUNK).zip(gates.par_chunks(CHUNK)).zip(ups.par_chunks(CHUNK)).for_each(|((y, gates), ups)| {
            vectorised(
                #[inline(always)]
                || {
                    for ((y, gate), up) in y.iter_mut().zip(gates).zip(ups) {
                        *y = gate * sigmoid(*gate) * up;
                    }
                },
            );
        });
        tensor(y.into_values(), gate.shape())
    }

    /// With `s = sigmoid(gate)`: `dgate = dy * up * s * (1 + gate (1 - s))`, `dup = dy * gate * s`.
    fn backward(gate: &FlexTensor, up: &FlexTensor, dy: &FlexTensor) -> (FlexTensor, FlexTensor) {
        let (gates, ups, upstream) = (values(gate), values(up), values(dy));
        let (mut dgate, mut dup) = (Cleared::new(gates.len()), Cleared::new(gates.len()));
        let outputs = dgate.parts(CHUNK).zip(dup.parts(CHUNK));
        let inputs = gates.par_chunks(CHUNK).zip(ups.par_chunks(CHUNK)).zip(upstream.par_chunks(CHUNK));
        outputs.zip(inputs).for_each(|((dgate, dup), ((gates, ups), dy))| {
            vectorised(
                #[inline(always)]
                || {
                    for (((dgate, dup), (gate, up)), dy) in
                        dgate.iter_mut().zip(&mut *dup).zip(gates.iter().zip(ups)).zip(dy)
                    {
                        let s = sigmoid(*gate);
                        *dgate = dy * up * s * (1.0 + gate * (1.0 - s));
                        *dup = dy * gate * s;
                    }
                },
            );
        });
        (tensor(dgate.into_values(), gate.shape()), tensor(dup.into_values(), gate.shape()))
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, random};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for (count, scale) in [(1, 1.0), (37, 3.0), (1 << 14, 1.0), (40_000, 30.0), (50, 1e4)] {
            let gate = random(&[count], 3).into_iter().map(|x| x * scale).collect();
            let check = Check::new(&[gate, random(&[count], 4)]);
            check.equal(|x| swiglu(x[0].clone(), x[1].clone()), |x| composed(x[0].clone(), x[1].clone()));
            if scale < 10.0 {
                check.gradients(|x| composed(x[0].clone(), x[1].clone()));
            }
        }
    }
}
