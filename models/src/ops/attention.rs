//! Causal attention with grouped queries.

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
pub fn causal_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, starts: Option<Tensor<2, Int>>) -> Tensor<4> {
    let [batch, queries, heads, width] = q.dims();
    let [_, keys, kv_heads, _] = k.dims();
    let repeat = |x: Tensor<4>| {
        let groups = x.unsqueeze_dim::<5>(3).expand([batch, keys, kv_heads, heads / kv_heads, width]);
        groups.reshape([batch, keys, heads, width]).swap_dims(1, 2)
    };
    let scores = q.swap_dims(1, 2).matmul(repeat(k).swap_dims(2, 3)).mul_scalar((width as f64).powf(-0.5));
    let device = scores.device();
    let own = Tensor::<1, Int>::arange((keys - queries) as i64..keys as i64, &device).reshape([queries, 1]).expand([queries, keys]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    fn random(shape: [usize; 4], seed: u64) -> Tensor<4> {
        let mut state = seed;
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::default())
    }

    fn at(x: &Tensor<4>, b: usize, t: usize, h: usize) -> Vec<f32> {
        x.clone().slice([b..b + 1, t..t + 1, h..h + 1]).into_data().try_into_vec().unwrap()
    }

    /// The definition, one query at a time.
    fn plain(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>, starts: &[[usize; 5]; 2]) -> Vec<f32> {
        let ([batch, queries, heads, width], [_, keys, kv_heads, _]) = (q.dims(), k.dims());
        let mut out = Vec::new();
        for (b, starts) in starts.iter().enumerate().take(batch) {
            for (t, start) in starts.iter().enumerate().take(queries) {
                for h in 0..heads {
                    let group = h / (heads / kv_heads);
                    let visible = *start..=keys - queries + t;
                    let scores: Vec<f32> = visible
                        .clone()
                        .map(|s| at(q, b, t, h).iter().zip(at(k, b, s, group)).map(|(q, k)| q * k).sum::<f32>() / (width as f32).sqrt())
                        .collect();
                    let total: f32 = scores.iter().map(|score| score.exp()).sum();
                    let mut sum = vec![0.0; width];
                    for (s, score) in visible.zip(scores) {
                        for (sum, v) in sum.iter_mut().zip(at(v, b, s, group)) {
                            *sum += score.exp() / total * v;
                        }
                    }
                    out.extend(sum);
                }
            }
        }
        out
    }

    #[test]
    fn equals_the_definition_with_groups_documents_and_earlier_positions() {
        for (heads, kv_heads, keys) in [(1, 1, 5), (4, 2, 5), (3, 1, 8)] {
            let (q, k, v) = (random([2, 5, heads, 6], 1), random([2, keys, kv_heads, 6], 2), random([2, keys, kv_heads, 6], 3));
            for starts in [[[0; 5], [0; 5]], [[0, 0, 2, 2, 4], [0, 1, 1, 1, 3]]] {
                let flat: Vec<i32> = starts.iter().flatten().map(|start| *start as i32).collect();
                let tensor = Tensor::<2, Int>::from_data(TensorData::new(flat, [2, 5]), &Device::default());
                let ours: Vec<f32> =
                    causal_attention(q.clone(), k.clone(), v.clone(), Some(tensor)).into_data().try_into_vec().unwrap();
                for (ours, expected) in ours.iter().zip(plain(&q, &k, &v, &starts)) {
                    assert!((ours - expected).abs() < 1e-5, "{ours} {expected}");
                }
            }
        }
    }
}
