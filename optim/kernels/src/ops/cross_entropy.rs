//! Output layer and cross-entropy together.

use burn::tensor::{Int, Tensor, activation};

/// Target that does not count.
pub const IGNORE: i32 = -100;

/// Rows whose logits exist at a time: enough for products at full speed, few enough to stay in the cache.
pub const LOSS_ROWS: usize = 256;

/// Sum of the cross-entropies in nats of `softmax(x W)`, shape `[1]`.
///
/// On the CPU backend the logits exist for some hundred rows at a time, and the gradients are computed with them.
///
/// - `x [n, d]`, `weight [d, vocabulary]` (also a transposed view of an embedding)
/// - `targets [n]`: token ids; [`IGNORE`] does not count
pub fn linear_cross_entropy(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&x) && super::flex::fits_weight(&weight) {
        return fused::linear_cross_entropy(x, weight, targets);
    }
    composed(x, weight, targets)
}

fn composed(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let logarithms = activation::log_softmax(x.matmul(super::widened(weight)), 1);
    let ignored = targets.clone().equal_elem(IGNORE);
    let picked = logarithms.gather(1, targets.mask_fill(ignored.clone(), 0).unsqueeze_dim(1)).squeeze_dim::<1>(1);
    picked.mask_fill(ignored, 0.0).sum().neg()
}

#[cfg(feature = "flex")]
mod fused {
    use std::borrow::Cow;

    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::{FloatTensor, IntTensor};
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
    use burn::tensor::{DType, Int, Tensor};
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use super::IGNORE;
    use crate::ops::flex::{contiguous, exp, tensor, values, vectorised, whole_numbers, zeros};
    use crate::ops::product::{Matrix, Operand, multiplied, product, readable};

    const CHUNK: usize = super::LOSS_ROWS;

    pub fn linear_cross_entropy(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        let targets = targets.cast(DType::I32).into_dispatch();
        Tensor::from_dispatch(<Dispatch as CrossEntropyOp>::fused_cross_entropy(x, weight, targets))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait CrossEntropyOp: Backend {
        fn fused_cross_entropy(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            targets: IntTensor<Self>,
        ) -> FloatTensor<Self>;
    }

    impl CrossEntropyOp for Flex {
        fn fused_cross_entropy(x: FlexTensor, weight: FlexTensor, targets: FlexTensor) -> FlexTensor {
            Loss::of(x, weight, targets, false, false).sum
        }
    }

    impl<C: CheckpointStrategy> CrossEntropyOp for Autodiff<Flex, C> {
        fn fused_cross_entropy(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            targets: IntTensor<Self>,
        ) -> FloatTensor<Self> {
            let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
            let prepared = CrossEntropyBackward.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
            let loss = Loss::of(x.into_primitive(), weight.into_primitive(), targets, x_tracked, weight_tracked);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((loss.dx, loss.dweight), loss.sum),
                OpsKind::UnTracked(prepared) => prepared.finish(loss.sum),
            }
        }
    }

    #[derive(Debug)]
    struct CrossEntropyBackward;

    impl Backward<Flex, 2> for CrossEntropyBackward {
        type State = (Option<FlexTensor>, Option<FlexTensor>);

        fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let upstream = contiguous(grads.consume::<Flex>(&ops.node));
            let factor = values(&upstream)[0];
            let (dx, dweight) = ops.state;
            for (node, gradient) in ops.parents.into_iter().zip([dx, dweight]) {
                if let (Some(node), Some(gradient)) = (node, gradient) {
                    grads.register::<Flex>(node.id, scaled(gradient, factor));
                }
            }
        }
    }

    /// In place, as the gradient is not shared.
    fn scaled(mut gradient: FlexTensor, factor: f32) -> FlexTensor {
        gradient
            .storage_mut::<f32>()
            .par_chunks_mut(1 << 14)
            .for_each(|values| values.iter_mut().for_each(|value| *value *= factor));
        gradient
    }

    struct Loss {
        sum: FlexTensor,
        dx: Option<FlexTensor>,
        dweight: Option<FlexTensor>,
    }

    impl Loss {
        /// The loss, and the gradients of the inputs that need one.
        fn of(x: FlexTensor, weight: FlexTensor, targets: FlexTensor, want_dx: bool, want_dweight: bool) -> Self {
            let (x, weight, targets) = (contiguous(x), readable(weight), contiguous(targets));
            let (rows, width, vocabulary) = (x.shape()[0], x.shape()[1], weight.shape()[1]);
            let (source, weights, targets) = (values(&x), Operand::of(&weight), whole_numbers(&targets));
            // The gradient of a transposed view has its order in memory.
            let flipped = weights.is_transposed();
            // Rows whose target does not count have no logits: in fine-tuning on answers they are most of all rows.
            let counted: Vec<usize> = (0..rows).filter(|row| targets[*row] != IGNORE).collect();
            let mut dx = want_dx.then(|| zeros(rows * width));
            let mut dweight = want_dweight.then(|| zeros(width * vocabulary));
            let mut logits = zeros(CHUNK.min(counted.len()) * vocabulary);
            let mut sum = 0.0f64;
            for (chunk, counted) in counted.chunks(CHUNK).enumerate() {
                let logits = &mut logits[..counted.len() * vocabulary];
                let rows = gathered(source, counted, width);
                let rows = Matrix::row_major(&rows[..], counted.len(), width);
                product(Matrix::row_major(&mut *logits, counted.len(), vocabulary), false, 1.0, rows, weights, true);
                let gradients = want_dx || want_dweight;
                let losses: Vec<f64> = logits
                    .par_chunks_mut(vocabulary)
                    .zip(counted)
                    .map(|(logits, row)| {
                        vectorised(
                            #[inline(always)]
                            || row_loss(logits, targets[*row] as usize, gradients),
                        )
                    })
                    .collect();
                sum += losses.iter().sum::<f64>();
                let dlogits = Matrix::row_major(&*logits, counted.len(), vocabulary);
                if let Some(dx) = &mut dx {
                    let gradient = multiplied(1.0, dlogits, weights.transposed());
                    for (row, gradient) in counted.iter().zip(gradient.chunks_exact(width)) {
                        dx[row * width..(row + 1) * width].copy_from_slice(gradient);
                    }
                }
                if let Some(dweight) = &mut dweight {
                    let out = match flipped {
                        true => Matrix::row_major(&mut dweight[..], vocabulary, width).transposed(),
                        false => Matrix::row_major(&mut dweight[..], width, vocabulary),
                    };
                    product(out, chunk > 0, 1.0, rows.transposed(), dlogits, true);
                }
            }
            let dweight = dweight.map(|values| match flipped {
                true => tensor(values, [vocabulary, width]).transpose(0, 1),
                false => tensor(values, [width, vocabulary]),
            });
            Self { sum: tensor(vec![sum as f32], [1]), dx: dx.map(|values| tensor(values, [rows, width])), dweight }
        }
    }

    /// These rows, one after another.
    fn gathered<'a>(source: &'a [f32], rows: &[usize], width: usize) -> Cow<'a, [f32]> {
        let [first, .., last] = *rows else { return Cow::Borrowed(&source[rows[0] * width..(rows[0] + 1) * width]) };
        if last - first + 1 == rows.len() {
            return Cow::Borrowed(&source[first * width..(last + 1) * width]);
        }
        Cow::Owned(rows.iter().flat_map(|row| &source[row * width..(row + 1) * width]).copied().collect())
    }

    /// The loss of one row; its logits become the gradient if `gradients`.
    #[inline(always)]
    fn row_loss(logits: &mut [f32], target: usize, gradients: bool) -> f64 {
        let own = logits[target];
        let mut largest = [f32::NEG_INFINITY; 16];
        let (lanes, rest) = logits.as_chunks::<16>();
        for lane in lanes {
            for (most, value) in largest.iter_mut().zip(lane) {
                *most = most.max(*value);
            }
        }
        let most = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let mut sums = [0.0f32; 16];
        let (lanes, rest) = logits.as_chunks_mut::<16>();
        for lane in lanes {
            for (sum, value) in sums.iter_mut().zip(lane) {
                let weight = exp(*value - most);
                *sum += weight;
                *value = weight;
            }
        }
        let mut total: f32 = sums.iter().sum();
        for value in rest {
            *value = exp(*value - most);
            total += *value;
        }
        if gradients {
            let factor = 1.0 / total;
            logits.iter_mut().for_each(|value| *value *= factor);
            logits[target] -= 1.0;
        }
        // A largest logit that is not a number has hidden in `max`: it shows here.
        f64::from(most) + f64::from(total).ln() - f64::from(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn sums_over_the_targets_that_count() {
        let device = Device::default();
        let x = Tensor::<2>::from_data([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], &device);
        let weight = Tensor::<2>::from_data([[1.0, 0.0, -1.0], [0.5, 1.0, 0.0]], &device);
        let targets = Tensor::<1, Int>::from_data(TensorData::from([2, IGNORE, 0]), &device);
        let loss: f32 = linear_cross_entropy(x, weight, targets).into_scalar();
        let entropy = |logits: [f32; 3], target: usize| logits.map(f32::exp).iter().sum::<f32>().ln() - logits[target];
        let expected = entropy([2.0, 2.0, -1.0], 2) + entropy([3.0, 0.0, -3.0], 0);
        assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
    }

    #[cfg(feature = "flex")]
    #[test]
    fn the_fused_form_equals_the_composed_one() {
        use crate::ops::check::{Check, device, random};
        for (rows, width, vocabulary, scale) in
            [(1, 3, 5, 1.0), (7, 8, 33, 3.0), (300, 16, 40, 1.0), (513, 4, 20, 100.0)]
        {
            let x = random(&[rows, width], 5).into_iter().map(|x| x * scale).collect();
            let check = Check::new(&[x, random(&[width, vocabulary], 6)]);
            let ids: Vec<i32> =
                (0..rows as i32).map(|i| if i % 5 == 3 { IGNORE } else { i * 7 % vocabulary as i32 }).collect();
            let targets =
                |x: &[Tensor<1>]| Tensor::<1, Int>::from_data(TensorData::new(ids.clone(), [rows]), &device(x));
            let split = |x: &[Tensor<1>]| (x[0].clone().reshape([rows, width]), x[1].clone());
            let plain = |x: &[Tensor<1>]| (split(x).0, split(x).1.reshape([width, vocabulary]));
            let tied = |x: &[Tensor<1>]| (split(x).0, split(x).1.reshape([vocabulary, width]).transpose());
            let form = |x: &[Tensor<1>]| {
                let (a, b) = plain(x);
                composed(a, b, targets(x))
            };
            if scale == 1.0 {
                check.gradients(form);
            }
            check.equal(
                |x| {
                    let (a, b) = plain(x);
                    linear_cross_entropy(a, b, targets(x))
                },
                form,
            );
            check.equal(
                |x| {
                    let (a, b) = tied(x);
                    linear_cross_entropy(a, b, targets(x))
                },
                |x| {
                    let (a, b) = tied(x);
                    composed(a, b, targets(x))
                },
            );
        }
    }
}
