//! Rows of a table by token id.

use burn::tensor::{Int, Tensor};

/// Rows of `weight [vocabulary, d]` for token ids `[b, t]`: `[b, t, d]`.
///
/// On the CPU backend the gradient of the table is computed by all threads, each row of it by one of them, in the order of the positions.
pub fn embedding(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if super::flex::fits_weight(&weight) {
        return fused::embedding(weight, ids);
    }
    composed(weight, ids)
}

fn composed(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    let [batch, positions] = ids.dims();
    let width = weight.dims()[1];
    super::widened(weight).select(0, ids.reshape([batch * positions])).reshape([batch, positions, width])
}

#[cfg(feature = "flex")]
mod fused {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::{FloatTensor, IntTensor};
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
    use burn::tensor::{DType, Int, Tensor};
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use crate::ops::flex::{Cleared, ROWS, contiguous, tensor, values, vectorised, whole_numbers};
    use crate::ops::product::{Operand, readable};

    pub fn embedding(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
        let (weight, ids) = (weight.into_dispatch(), ids.cast(DType::I32).into_dispatch());
        Tensor::from_dispatch(<Dispatch as EmbeddingOp>::fused_embedding(weight, ids))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait EmbeddingOp: Backend {
        fn fused_embedding(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;
    }

    impl EmbeddingOp for Flex {
        fn fused_embedding(weight: FlexTensor, ids: FlexTensor) -> FlexTensor {
            forward(&readable(weight), &contiguous(ids))
        }
    }

    impl<C: CheckpointStrategy> EmbeddingOp for Autodiff<Flex, C> {
        fn fused_embedding(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
            let prepared = EmbeddingBackward.prepare::<C>([weight.node()]).compute_bound().stateful();
            let (weight, ids) = (readable(weight.into_primitive()), contiguous(ids));
            let rows = forward(&weight, &ids);
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((ids, weight.shape()[0]), rows),
                OpsKind::UnTracked(prepared) => prepared.finish(rows),
            }
        }
    }

    #[derive(Debug)]
    struct EmbeddingBackward;

    impl Backward<Flex, 1> for EmbeddingBackward {
        /// Token ids, and the size of the vocabulary.
        type State = (FlexTensor, usize);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let dy = contiguous(grads.consume::<Flex>(&ops.node));
            let (ids, vocabulary) = ops.state;
            if let [Some(node)] = ops.parents {
                grads.register::<Flex>(node.id, backward(&ids, vocabulary, &dy));
            }
        }
    }

    fn forward(weight: &FlexTensor, ids: &FlexTensor) -> FlexTensor {
        let (table, width) = (Operand::of(weight), weight.shape()[1]);
        let mut rows = vec![0.0; ids.shape().num_elements() * width];
        for (id, row) in whole_numbers(ids).iter().zip(rows.chunks_exact_mut(width)) {
            // A negative id becomes a huge index.
            assert!((*id as usize) < table.rows(), "id {id} is out of range: there are {} rows", table.rows());
            table.row(*id as usize, row);
        }
        tensor(rows, [ids.shape()[0], ids.shape()[1], width])
    }

    fn backward(ids: &FlexTensor, vocabulary: usize, dy: &FlexTensor) -> FlexTensor {
        let (gradients, width) = (values(dy), dy.shape()[2]);
        let mut by_id: Vec<(usize, usize)> =
            whole_numbers(ids).iter().enumerate().map(|(position, id)| (*id as usize, position)).collect();
        by_id.sort_unstable();
        let mut table = Cleared::new(vocabulary * width);
        table.parts(ROWS * width).enumerate().for_each(|(chunk, rows)| {
            let first = chunk * ROWS;
            let begin = by_id.partition_point(|(id, _)| *id < first);
            let mut mine = by_id[begin..].iter().take_while(|(id, _)| *id < first + ROWS);
            vectorised(
                #[inline(always)]
                || {
                    for (id, position) in &mut mine {
                        let row = &mut rows[(id - first) * width..][..width];
                        row.iter_mut()
                            .zip(&gradients[position * width..][..width])
                            .for_each(|(sum, gradient)| *sum += gradient);
                    }
                },
            );
        });
        tensor(table.into_values(), [vocabulary, width])
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::check::{Check, device, random};
    use burn::tensor::{Device, TensorData};

    #[test]
    fn the_fused_form_equals_the_composed_one() {
        for ([vocabulary, width], [batch, positions], step) in [
            ([1, 1], [1, 1], 1),
            ([300, 7], [2, 50], 37),
            ([64, 33], [3, 40], 0),
            ([65, 16], [1, 200], 64),
            ([129, 5], [7, 1], 128),
        ] {
            let ids: Vec<i32> = (0..batch * positions).map(|place| (place * step % vocabulary) as i32).collect();
            let data = TensorData::new(ids, [batch, positions]);
            let ids = Tensor::<2, Int>::from_data(data, &Device::default());
            let run = |form: fn(Tensor<2>, Tensor<2, Int>) -> Tensor<3>| {
                let ids = ids.clone();
                move |x: &[Tensor<1>]| {
                    let ids = ids.clone().to_device(&device(x));
                    form(x[0].clone().reshape([vocabulary, width]), ids).flatten::<1>(0, 2)
                }
            };
            for scale in [1.0, 1e-4, 1e4] {
                let table = random(&[vocabulary, width], 1).into_iter().map(|x| x * scale).collect();
                let check = Check::new(&[table]);
                check.equal(run(embedding), run(composed));
                if scale == 1.0 {
                    check.gradients(run(composed));
                }
            }
        }
    }

    #[test]
    fn repeated_ids_add_up_in_the_order_of_their_positions() {
        let device = Device::default();
        // In another order of additions the small values would be lost, or kept, in other places.
        let gradients = [1e8f32, 1.0, -1e8, 1.0];
        let table = Tensor::<2>::zeros([3, 1], &device.clone().autodiff()).require_grad();
        let ids = Tensor::<2, Int>::from_data([[1, 1, 1, 1]], &device);
        let weights = Tensor::<3>::from_data([gradients.map(|gradient| [gradient])], &device.autodiff());
        let mut grads = (embedding(table.clone(), ids) * weights).sum().backward();
        let gradient = table.grad_remove(&mut grads).unwrap().into_data().try_into_vec::<f32>().unwrap();
        assert_eq!(gradient, [0.0, gradients.into_iter().sum(), 0.0]);
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn an_id_below_zero_has_no_row() {
        let device = Device::default();
        embedding(Tensor::zeros([3, 2], &device), Tensor::from_data([[-1]], &device));
    }
}
