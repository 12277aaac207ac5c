//! Rotary position embedding.

use burn::tensor::{Device, Tensor, TensorData};

/// Sines and cosines of the angles of positions.
///
/// "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864).
#[derive(Clone, Debug)]
pub struct Rotary {
    /// `[positions, head_dim / 2]`, plain tensors: no gradient flows into them.
    cos: Tensor<2>,
    sin: Tensor<2>,
}

impl Rotary {
    /// Angles of the first `positions` positions for heads of an even width: `position * theta^(-2 i / head_dim)`.
    pub fn new(head_dim: usize, positions: usize, theta: f64, device: &Device) -> Self {
        Self::of_rates(&Self::rates(head_dim, theta), 1.0, positions, device)
    }

    /// Angles of one position: `theta^(-2 i / head_dim)`.
    pub fn rates(head_dim: usize, theta: f64) -> Vec<f64> {
        (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect()
    }

    /// Angles `position * rate` of the first `positions` positions; sines and cosines are multiplied by `scale`.
    pub fn of_rates(rates: &[f64], scale: f64, positions: usize, device: &Device) -> Self {
        let half = rates.len();
        let device = device.clone().inner();
        let table = |f: fn(f64) -> f64| {
            let values = (0..positions)
                .flat_map(|position| rates.iter().map(move |rate| (scale * f(position as f64 * rate)) as f32));
            Tensor::from_data(TensorData::new(values.collect::<Vec<_>>(), [positions, half]), &device)
        };
        Self { cos: table(f64::cos), sin: table(f64::sin) }
    }
}

/// Rotates each head of `x [b, t, h, d]`, whose first position has index `offset`.
///
/// Pairs are the halves of a head, as in Hugging Face's LLaMA: element `i` is rotated with element `i + d / 2`.
pub fn rotary(x: Tensor<4>, table: &Rotary, offset: usize) -> Tensor<4> {
    let positions = x.dims()[1];
    let rows = |table: &Tensor<2>| table.clone().narrow(0, offset, positions);
    let (cos, sin) = (rows(&table.cos), rows(&table.sin));
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) && super::flex::fits(&cos) {
        return fused::rotary(x, cos, sin);
    }
    composed(x, cos, sin)
}

/// `cos` and `sin [t, d / 2]`.
fn composed(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let [_, positions, _, width] = x.dims();
    let half = width / 2;
    let (cos, sin) = (cos.reshape([1, positions, 1, half]), sin.reshape([1, positions, 1, half]));
    let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let turned_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let turned_second = second * cos + first * sin;
    Tensor::cat(vec![turned_first, turned_second], 3)
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

    use crate::ops::flex::{Cleared, contiguous, tensor, values, vectorised};

    pub fn rotary(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
        let (x, cos, sin) = (x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch());
        Tensor::from_dispatch(<Dispatch as RotaryOp>::fused_rotary(x, cos, sin))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait RotaryOp: Backend {
        fn fused_rotary(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self>;
    }

    impl RotaryOp for Flex {
        fn fused_rotary(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
            turn(x, &contiguous(cos), &contiguous(sin), 1.0)
        }
    }

    impl<C: CheckpointStrategy> RotaryOp for Autodiff<Flex, C> {
        fn fused_rotary(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
            let prepared = RotaryBackward.prepare::<C>([x.node()]).compute_bound().stateful();
            let (cos, sin) = (contiguous(cos.into_primitive()), contiguous(sin.into_primitive()));
            let y = turn(x.into_primitive(), &cos, &sin, 1.0);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((cos, sin), y),
                OpsKind::UnTracked(prepared) => prepared.finish(y),
            }
        }
    }

    #[derive(Debug)]
    struct RotaryBackward;

    impl Backward<Flex, 1> for RotaryBackward {
        type State = (FlexTensor, FlexTensor);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = grads.consume::<Flex>(&ops.node);
            let (cos, sin) = ops.state;
            let [node] = ops.parents;
            if let Some(node) = node {
                // The inverse of a rotation is the rotation by the opposite angle.
                grads.register::<Flex>(node.id, turn(dy, &cos, &sin, -1.0));
            }
        }
    }

    /// Rotates by the angles times `direction`.
    fn turn(x: FlexTensor, cos: &FlexTensor, sin: &FlexTensor, direction: f32) -> FlexTensor {
        let x = contiguous(x);
        let shape = x.shape();
        let (positions, row, half) = (shape[1], shape[2] * shape[3], shape[3] / 2);
        let mut y = Cleared::new(values(&x).len());
        y.parts(row).zip(values(&x).par_chunks(row)).enumerate().for_each(|(place, (y, x))| {
            let angles = place % positions * half..(place % positions + 1) * half;
            let (cos, sin) = (&values(cos)[angles.clone()], &values(sin)[angles]);
            vectorised(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                        let ((y1, y2), (x1, x2)) = (y.split_at_mut(half), x.split_at(half));
                        for i in 0..half {
                            let sin = direction * sin[i];
                            y1[i] = x1[i] * cos[i] - x2[i] * sin;
                            y2[i] = x2[i] * cos[i] + x1[i] * sin;
                        }
                    }
                },
            );
        });
        tensor(y.into_values(), shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotate(values: [f32; 4], offset: usize) -> Vec<f32> {
        let device = Device::default();
        let x = Tensor::<4>::from_data(TensorData::new(values.to_vec(), [1, 1, 1, 4]), &device);
        rotary(x, &Rotary::new(4, 9, 100.0, &device), offset).into_data().try_into_vec().unwrap()
    }

    #[test]
    fn halves_turn_by_position_times_rate() {
        let turned = rotate([1.0, 0.0, 0.0, 2.0], 3);
        // The second pair has rate 100^(-2/4) = 0.1.
        let expected = [3f32.cos(), -2.0 * 0.3f32.sin(), 3f32.sin(), 2.0 * 0.3f32.cos()];
        for (ours, expected) in turned.iter().zip(expected) {
            assert!((ours - expected).abs() < 1e-6, "{turned:?}");
        }
        assert_eq!(rotate([1.0, 2.0, 3.0, 4.0], 0), [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn products_depend_on_the_distance_alone() {
        let dot = |a: usize, b: usize| {
            let (q, k) = (rotate([0.3, -1.0, 0.5, 2.0], a), rotate([1.0, 0.7, -0.2, 0.4], b));
            q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>()
        };
        assert!((dot(5, 2) - dot(8, 5)).abs() < 1e-5);
    }

    #[cfg(feature = "flex")]
    #[test]
    fn the_fused_form_equals_the_composed_one() {
        use crate::ops::check::{Check, device, random};
        for shape in [[1, 1, 1, 2], [2, 5, 3, 6], [1, 70, 2, 64]] {
            let table = |x: &[Tensor<1>]| Rotary::new(shape[3], shape[1], 1e4, &device(x));
            let form = |x: &[Tensor<1>]| {
                let table = table(x);
                let [cos, sin] = [table.cos, table.sin].map(|table| table.cast(x[0].dtype()));
                composed(x[0].clone().reshape(shape), cos, sin).flatten::<1>(0, 3)
            };
            let check = Check::new(&[random(&shape, 1)]);
            check.equal(|x| rotary(x[0].clone().reshape(shape), &table(x), 0).flatten::<1>(0, 3), form);
            check.gradients(form);
        }
    }
}
