//! Attention against its definition, composed and fused.

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
                    .map(|s| {
                        at(q, b, t, h).iter().zip(at(k, b, s, group)).map(|(q, k)| q * k).sum::<f32>()
                            / (width as f32).sqrt()
                    })
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
        let (q, k, v) =
            (random([2, 5, heads, 6], 1), random([2, keys, kv_heads, 6], 2), random([2, keys, kv_heads, 6], 3));
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

#[cfg(feature = "flex")]
#[test]
fn the_fused_form_equals_the_composed_one() {
    use crate::ops::check::{Check, device, random};
    for (batch, queries, heads, width, keys, kv_heads) in
        [(1, 1, 1, 2, 1, 1), (2, 5, 4, 6, 5, 2), (1, 130, 2, 16, 130, 1), (2, 3, 3, 8, 70, 3), (1, 65, 6, 4, 100, 2)]
    {
        let (q, k) = ([batch, queries, heads, width], [batch, keys, kv_heads, width]);
        let stretched = random(&q, 7).into_iter().map(|x| x * 5.0).collect();
        let check = Check::new(&[stretched, random(&k, 8), random(&k, 9)]);
        let documents: Vec<i32> =
            (0..batch * queries).map(|i| ((keys - queries + i % queries) / 3 * 2) as i32).collect();
        let starts =
            || Tensor::<2, Int>::from_data(TensorData::new(documents.clone(), [batch, queries]), &Device::default());
        let shaped = |x: &[Tensor<1>]| (x[0].clone().reshape(q), x[1].clone().reshape(k), x[2].clone().reshape(k));
        // Heads first in memory: views that are not contiguous.
        let viewed = |x: &[Tensor<1>]| {
            let (q, k, v) = shaped(x);
            let turn = |x: Tensor<4>| {
                let [b, t, h, d] = x.dims();
                x.reshape([b, h, t, d]).swap_dims(1, 2)
            };
            (turn(q), turn(k), turn(v))
        };
        for (starts, scale) in [(None, None), (Some(starts()), None), (None, Some(1.25))] {
            let causal = Form { causal: true, scale };
            let starts = |x: &[Tensor<1>]| starts.clone().map(|starts| starts.to_device(&device(x)));
            let form = |x: &[Tensor<1>]| {
                let (q, k, v) = shaped(x);
                composed(q, k, v, starts(x), causal).flatten::<1>(0, 3)
            };
            check.gradients(form);
            check.equal(
                |x| {
                    let (q, k, v) = shaped(x);
                    scaled_causal_attention(q, k, v, starts(x), scale).flatten::<1>(0, 3)
                },
                form,
            );
            check.equal(
                |x| {
                    let (q, k, v) = viewed(x);
                    scaled_causal_attention(q, k, v, starts(x), scale).flatten::<1>(0, 3)
                },
                |x| {
                    let (q, k, v) = viewed(x);
                    composed(q, k, v, starts(x), causal).flatten::<1>(0, 3)
                },
            );
        }
    }
}

#[cfg(feature = "flex")]
#[test]
fn two_way_attention_sees_every_key_in_both_forms() {
    use crate::ops::check::{Check, random};
    for (batch, queries, heads, width, keys, kv_heads) in
        [(1, 1, 1, 2, 1, 1), (2, 5, 4, 6, 5, 2), (1, 130, 2, 16, 130, 1), (2, 7, 3, 8, 3, 3), (1, 65, 6, 4, 100, 2)]
    {
        let (q, k) = ([batch, queries, heads, width], [batch, keys, kv_heads, width]);
        let stretched = random(&q, 7).into_iter().map(|x| x * 5.0).collect();
        let check = Check::new(&[stretched, random(&k, 8), random(&k, 9)]);
        let shaped = |x: &[Tensor<1>]| (x[0].clone().reshape(q), x[1].clone().reshape(k), x[2].clone().reshape(k));
        let form = |x: &[Tensor<1>]| {
            let (q, k, v) = shaped(x);
            composed(q, k, v, None, Form { causal: false, scale: None }).flatten::<1>(0, 3)
        };
        check.gradients(form);
        check.equal(
            |x| {
                let (q, k, v) = shaped(x);
                attention(q, k, v).flatten::<1>(0, 3)
            },
            form,
        );
    }
    // The last query of a causal attention sees all keys too.
    let (q, k, v) = (
        super::tests::random([2, 1, 2, 6], 1),
        super::tests::random([2, 9, 2, 6], 2),
        super::tests::random([2, 9, 2, 6], 3),
    );
    let causal = causal_attention(q.clone(), k.clone(), v.clone(), None);
    attention(q, k, v).into_data().assert_eq(&causal.into_data(), true);
}
