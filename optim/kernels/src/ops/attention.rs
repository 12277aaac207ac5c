//! Softmax attention with grouped queries, causal or two-way.

use burn::tensor::{Int, Tensor, activation};

/// Below every score that occurs, and finite, so that no infinite values meet.
const MASKED: f64 = -1e30;

/// Softmax attention in which a position sees itself and earlier ones.
///
/// "Attention Is All You Need" (arXiv 1706.03762); fewer key than query heads as in "GQA: Training Generalized Multi-Query Transformer Models
/// from Multi-Head Checkpoints" (arXiv 2305.13245).
///
/// - `q [b, t, h, d]`, `k` and `v [b, s, kv, d]` with `s >= t`: the queries are the last `t` of `s` positions; `h` is a multiple of `kv`
/// - `starts [b, t]`: the first of the `s` positions that each query sees, for documents packed in a row
/// - returns `[b, t, h, d]`
///
/// On the CPU backend the scores exist for some queries at a time, and are computed again in the backward pass.
pub fn causal_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, starts: Option<Tensor<2, Int>>) -> Tensor<4> {
    attend(q, k, v, starts, Form { causal: true, scale: None })
}

/// As [`causal_attention`], with another factor of the scores than `1 / sqrt(d)`.
pub fn scaled_causal_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    starts: Option<Tensor<2, Int>>,
    scale: Option<f64>,
) -> Tensor<4> {
    attend(q, k, v, starts, Form { causal: true, scale })
}

/// Softmax attention in which every query sees all keys, as in "An Image is Worth 16x16 Words" (arXiv 2010.11929). Shapes as in
/// [`causal_attention`], but for any number of keys.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    attend(q, k, v, None, Form { causal: false, scale: None })
}

/// Kind of an attention.
#[derive(Clone, Copy, Debug)]
struct Form {
    /// A position sees itself and earlier ones.
    causal: bool,
    /// Factor of the scores; none for `1 / sqrt(d)`.
    scale: Option<f64>,
}

fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, starts: Option<Tensor<2, Int>>, form: Form) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if super::flex::fits(&q) && super::flex::fits(&k) && super::flex::fits(&v) {
        return fused::attend(q, k, v, starts, form);
    }
    composed(q, k, v, starts, form)
}

fn composed(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, starts: Option<Tensor<2, Int>>, form: Form) -> Tensor<4> {
    let [batch, queries, heads, width] = q.dims();
    let [_, keys, kv_heads, _] = k.dims();
    let repeat = |x: Tensor<4>| {
        let groups = x.unsqueeze_dim::<5>(3).expand([batch, keys, kv_heads, heads / kv_heads, width]);
        groups.reshape([batch, keys, heads, width]).swap_dims(1, 2)
    };
    let scores = q.swap_dims(1, 2).matmul(repeat(k).swap_dims(2, 3));
    let scores = scores.mul_scalar(form.scale.unwrap_or((width as f64).powf(-0.5)));
    if !form.causal {
        return activation::softmax(scores, 3).matmul(repeat(v)).swap_dims(1, 2);
    }
    let device = scores.device();
    let own = Tensor::<1, Int>::arange((keys - queries) as i64..keys as i64, &device)
        .reshape([queries, 1])
        .expand([queries, keys]);
    let seen = Tensor::<1, Int>::arange(0..keys as i64, &device).reshape([1, keys]).expand([queries, keys]);
    let later = seen.clone().greater(own).reshape([1, 1, queries, keys]);
    let scores = scores.mask_fill(later.expand([batch, heads, queries, keys]), MASKED);
    let scores = match starts {
        None => scores,
        Some(starts) => {
            let starts = starts.reshape([batch, queries, 1]).expand([batch, queries, keys]);
            let before = seen.reshape([1, queries, keys]).expand([batch, queries, keys]).lower(starts);
            scores.mask_fill(before.reshape([batch, 1, queries, keys]).expand([batch, heads, queries, keys]), MASKED)
        }
    };
    activation::softmax(scores, 3).matmul(repeat(v)).swap_dims(1, 2)
}

#[cfg(feature = "flex")]
mod softmax;

#[cfg(feature = "flex")]
mod fused {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::{FloatTensor, IntTensor};
    use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
    use burn::tensor::{DType, Int, Tensor, TensorData};
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use super::Form;
    use super::softmax::{softmax, softmax_slopes};
    use crate::ops::flex::{Cleared, contiguous, tensor, values, vectorised};
    use crate::ops::product::{Matrix, product};

    /// Queries whose scores exist at a time.
    const BLOCK: usize = 64;

    pub fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, starts: Option<Tensor<2, Int>>, form: Form) -> Tensor<4> {
        let [batch, queries, ..] = q.dims();
        let starts = starts
            .unwrap_or_else(|| Tensor::from_data(TensorData::zeros::<i32, _>([batch, queries]), &q.device().inner()));
        let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
        Tensor::from_dispatch(<Dispatch as AttentionOp>::fused_attention(q, k, v, starts.into_dispatch(), form))
    }

    #[backend_extension(Flex, Autodiff)]
    pub trait AttentionOp: Backend {
        fn fused_attention(
            q: FloatTensor<Self>,
            k: FloatTensor<Self>,
            v: FloatTensor<Self>,
            starts: IntTensor<Self>,
            form: Form,
        ) -> FloatTensor<Self>;
    }

    impl AttentionOp for Flex {
        fn fused_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor, starts: FlexTensor, form: Form) -> FlexTensor {
            Attention::new(q, k, v, starts, form).forward().0
        }
    }

    impl<C: CheckpointStrategy> AttentionOp for Autodiff<Flex, C> {
        fn fused_attention(
            q: FloatTensor<Self>,
            k: FloatTensor<Self>,
            v: FloatTensor<Self>,
            starts: IntTensor<Self>,
            form: Form,
        ) -> FloatTensor<Self> {
            let prepared = AttentionBackward.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful();
            let attention = Attention::new(q.into_primitive(), k.into_primitive(), v.into_primitive(), starts, form);
            let (output, logarithms) = attention.forward();
            match prepared {
                OpsKind::Tracked(prepared) => prepared.finish((attention, logarithms), output),
                OpsKind::UnTracked(prepared) => prepared.finish(output),
            }
        }
    }

    #[derive(Debug)]
    struct AttentionBackward;

    impl Backward<Flex, 3> for AttentionBackward {
        type State = (Attention, Vec<f32>);

        fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
            let upstream = grads.consume::<Flex>(&ops.node);
            let (attention, logarithms) = ops.state;
            let gradients = attention.backward(&logarithms, upstream);
            for (node, gradient) in ops.parents.into_iter().zip(gradients) {
                if let Some(node) = node {
                    grads.register::<Flex>(node.id, gradient);
                }
            }
        }
    }

    /// Inputs and sizes of one call.
    #[derive(Clone, Debug)]
    struct Attention {
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        starts: Vec<i32>,
        batch: usize,
        queries: usize,
        heads: usize,
        width: usize,
        keys: usize,
        kv_heads: usize,
        /// A query sees no later keys than its own.
        form: Form,
    }

    impl Attention {
        fn new(q: FlexTensor, k: FlexTensor, v: FlexTensor, starts: FlexTensor, form: Form) -> Self {
            let [batch, queries, heads, width] = dims(&q);
            let [_, keys, kv_heads, _] = dims(&k);
            let starts = starts.into_data();
            let starts = match starts.dtype() {
                DType::I32 => starts,
                _ => starts.convert::<i32>(),
            };
            let starts = starts.try_into_vec::<i32>().unwrap_or_default();
            assert!(
                starts.len() == batch * queries && heads % kv_heads == 0 && (keys >= queries || !form.causal),
                "shapes of an attention"
            );
            Self {
                q: contiguous(q),
                k: contiguous(k),
                v: contiguous(v),
                starts,
                batch,
                queries,
                heads,
                width,
                keys,
                kv_heads,
                form,
            }
        }

        /// Query heads that share a key head.
        fn group(&self) -> usize {
            self.heads / self.kv_heads
        }

        fn scale(&self) -> f32 {
            self.form.scale.map_or(1.0 / (self.width as f32).sqrt(), |scale| scale as f32)
        }

        /// Blocks of queries with the keys that any of them sees.
        fn blocks(&self, batch: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> + '_ {
            (0..self.queries).step_by(BLOCK).map(move |first| {
                let count = BLOCK.min(self.queries - first);
                if !self.form.causal {
                    return (first, count, 0, self.keys);
                }
                let starts = &self.starts[batch * self.queries + first..][..count];
                let from = starts.iter().copied().min().unwrap_or(0).max(0) as usize;
                let to = self.keys - self.queries + first + count;
                (first, count, from.min(to - 1), to)
            })
        }

        /// Positions `from..to` of one head of a `[b, t, h, d]` tensor.
        fn rows<'a>(
            &self,
            x: &'a FlexTensor,
            heads: usize,
            place: (usize, usize),
            from: usize,
            to: usize,
        ) -> Matrix<&'a [f32]> {
            let (batch, head) = place;
            let positions = x.shape()[1];
            let stride = heads * self.width;
            let begin = (batch * positions + from) * stride + head * self.width;
            Matrix {
                data: &values(x)[begin..],
                rows: to - from,
                columns: self.width,
                row_stride: stride,
                column_stride: 1,
            }
        }

        /// Scores of a block, before the softmax.
        fn scores(&self, scores: &mut [f32], place: (usize, usize), block: (usize, usize, usize, usize)) {
            let (batch, head) = place;
            let (first, count, from, to) = block;
            let q = self.rows(&self.q, self.heads, place, first, first + count);
            let k = self.rows(&self.k, self.kv_heads, (batch, head / self.group()), from, to);
            product(Matrix::row_major(scores, count, to - from), false, self.scale(), q, k.transposed(), false);
        }

        /// Keys that the query at `row` of a block sees, counted from the block's first key.
        fn visible(&self, batch: usize, row: usize, block: (usize, usize, usize, usize)) -> std::ops::Range<usize> {
            let (first, _, from, to) = block;
            if !self.form.causal {
                return 0..to;
            }
            let query = first + row;
            let end = self.keys - self.queries + query + 1;
            let start = (self.starts[batch * self.queries + query].max(0) as usize).min(end - 1);
            start - from..end - from
        }

        /// The output, and of each head and query the logarithm of the sum of exponentials.
        fn forward(&self) -> (FlexTensor, Vec<f32>) {
            let size = self.queries * self.width;
            let mut output = Cleared::new(self.batch * self.heads * size);
            let mut logarithms = vec![0.0; self.batch * self.heads * self.queries];
            let tasks = output.parts(size).zip(logarithms.par_chunks_mut(self.queries)).enumerate();
            tasks.for_each(|(task, (output, logarithms))| {
                let place @ (batch, head) = (task / self.heads, task % self.heads);
                let mut scores = vec![0.0; BLOCK.min(self.queries) * self.keys];
                for block @ (first, count, from, to) in self.blocks(batch) {
                    let span = to - from;
                    let scores = &mut scores[..count * span];
                    self.scores(scores, place, block);
                    vectorised(
                        #[inline(always)]
                        || {
                            for (row, (scores, logarithm)) in
                                scores.chunks_exact_mut(span).zip(&mut logarithms[first..]).enumerate()
                            {
                                let visible = self.visible(batch, row, block);
                                scores[..visible.start].fill(0.0);
                                scores[visible.end..].fill(0.0);
                                *logarithm = softmax(&mut scores[visible]);
                            }
                        },
                    );
                    let out = Matrix::row_major(
                        &mut output[first * self.width..(first + count) * self.width],
                        count,
                        self.width,
                    );
                    let v = self.rows(&self.v, self.kv_heads, (batch, head / self.group()), from, to);
                    product(out, false, 1.0, Matrix::row_major(&*scores, count, span), v, false);
                }
            });
            // In the order that later operations read, so that they need no copy in addition to the one that is kept.
            (contiguous(self.positions_first(output.into_values(), self.heads, self.queries)), logarithms)
        }

        /// Gradients of queries, keys and values.
        fn backward(&self, logarithms: &[f32], upstream: FlexTensor) -> [FlexTensor; 3] {
            let upstream = contiguous(upstream);
            let (query_size, key_size) = (self.group() * self.queries * self.width, self.keys * self.width);
            let mut dq = Cleared::new(self.batch * self.heads * self.queries * self.width);
            let [mut dk, mut dv] = [(); 2].map(|()| Cleared::new(self.batch * self.kv_heads * key_size));
            let tasks = dq.parts(query_size).zip(dk.parts(key_size)).zip(dv.parts(key_size)).enumerate();
            tasks.for_each(|(task, ((dq, dk), dv))| {
                let (batch, kv_head) = (task / self.kv_heads, task % self.kv_heads);
                let most = BLOCK.min(self.queries) * self.keys;
                let (mut weights, mut gradients) = (vec![0.0; most], vec![0.0; most]);
                for inner in 0..self.group() {
                    let place @ (_, head) = (batch, kv_head * self.group() + inner);
                    let own = (batch * self.heads + head) * self.queries;
                    for block @ (first, count, from, to) in self.blocks(batch) {
                        let span = to - from;
                        let (weights, gradients) = (&mut weights[..count * span], &mut gradients[..count * span]);
                        self.scores(weights, place, block);
                        let dy = self.rows(&upstream, self.heads, place, first, first + count);
                        let v = self.rows(&self.v, self.kv_heads, (batch, kv_head), from, to);
                        product(Matrix::row_major(&mut *gradients, count, span), false, 1.0, dy, v.transposed(), false);
                        vectorised(
                            #[inline(always)]
                            || {
                                for row in 0..count {
                                    let weights = &mut weights[row * span..][..span];
                                    let gradients = &mut gradients[row * span..][..span];
                                    let visible = self.visible(batch, row, block);
                                    for hidden in [0..visible.start, visible.end..span] {
                                        weights[hidden.clone()].fill(0.0);
                                        gradients[hidden].fill(0.0);
                                    }
                                    let logarithm = logarithms[own + first + row];
                                    softmax_slopes(&mut weights[visible.clone()], &mut gradients[visible], logarithm);
                                }
                            },
                        );
                        let (weights, gradients) =
                            (Matrix::row_major(&*weights, count, span), Matrix::row_major(&*gradients, count, span));
                        let range = from * self.width..to * self.width;
                        let q = self.rows(&self.q, self.heads, place, first, first + count);
                        let k = self.rows(&self.k, self.kv_heads, (batch, kv_head), from, to);
                        product(
                            Matrix::row_major(&mut dv[range.clone()], span, self.width),
                            true,
                            1.0,
                            weights.transposed(),
                            dy,
                            false,
                        );
                        product(
                            Matrix::row_major(&mut dk[range], span, self.width),
                            true,
                            self.scale(),
                            gradients.transposed(),
                            q,
                            false,
                        );
                        let out = &mut dq[(inner * self.queries + first) * self.width..][..count * self.width];
                        product(Matrix::row_major(out, count, self.width), false, self.scale(), gradients, k, false);
                    }
                }
            });
            [
                self.positions_first(dq.into_values(), self.heads, self.queries),
                self.positions_first(dk.into_values(), self.kv_heads, self.keys),
                self.positions_first(dv.into_values(), self.kv_heads, self.keys),
            ]
        }

        /// Values with heads first as a tensor `[b, t, h, d]`.
        fn positions_first(&self, heads_first: Vec<f32>, heads: usize, positions: usize) -> FlexTensor {
            tensor(heads_first, [self.batch, heads, positions, self.width]).permute(&[0, 2, 1, 3])
        }
    }

    fn dims(x: &FlexTensor) -> [usize; 4] {
        let shape = x.shape();
        [shape[0], shape[1], shape[2], shape[3]]
    }
}

#[cfg(test)]
mod tests;
