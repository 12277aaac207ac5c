//! Element-wise parts of the optimizers: one pass over memory on the CPU backend, tensor operations elsewhere.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::host::{Memory, is_cpu};
use crate::vectorised::vectorised;

/// Values that one task takes.
pub const CHUNK: usize = 1 << 14;

/// Decays of the moments and what is added to the root of the second.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// Decay of the first moment.
    pub beta_1: f32,
    /// Decay of the second moment.
    pub beta_2: f32,
    /// One less the first decay, rounded once: in f32 the difference would lose five digits.
    pub share_1: f32,
    /// One less the second decay.
    pub share_2: f32,
    /// Added to the root of the second moment, which is not corrected for bias.
    pub epsilon: f32,
}

impl Adam {
    /// For these decays and this epsilon.
    pub fn new(beta_1: f64, beta_2: f64, epsilon: f64) -> Self {
        Self {
            beta_1: beta_1 as f32,
            beta_2: beta_2 as f32,
            share_1: (1.0 - beta_1) as f32,
            share_2: (1.0 - beta_2) as f32,
            epsilon: epsilon as f32,
        }
    }
}

/// Advances the moments with a gradient `g`: gives `m / (sqrt(v) + epsilon)`, `m` and `v`.
pub fn adam(g: Tensor<2>, m: Tensor<2>, v: Tensor<2>, f: Adam) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    if !is_cpu(&g.device()) {
        let m = m.mul_scalar(f.beta_1) + g.clone().mul_scalar(f.share_1);
        let v = v.mul_scalar(f.beta_2) + g.square().mul_scalar(f.share_2);
        return (m.clone() / v.clone().sqrt().add_scalar(f.epsilon), m, v);
    }
    let (mut g, mut m, mut v) = (Memory::of(g), Memory::of(m), Memory::of(v));
    let moments = m.write().par_chunks_mut(CHUNK).zip(v.write().par_chunks_mut(CHUNK));
    g.write().par_chunks_mut(CHUNK).zip(moments).for_each(|(g, (m, v))| {
        vectorised(
            #[inline(always)]
            || {
                for (g, (m, v)) in g.iter_mut().zip(m.iter_mut().zip(v.iter_mut())) {
                    *m = f.beta_1 * *m + f.share_1 * *g;
                    *v = f.beta_2 * *v + f.share_2 * (*g * *g);
                    *g = *m / (v.sqrt() + f.epsilon);
                }
            },
        );
    });
    (g.tensor(), m.tensor(), v.tensor())
}

/// `w * keep - rate * direction`, where nobody else holds the weights in their place.
pub fn descend(w: Tensor<2>, keep: f64, rate: f64, direction: Tensor<2>) -> Tensor<2> {
    if !is_cpu(&w.device()) {
        return w.mul_scalar(keep) - direction.mul_scalar(rate);
    }
    let (keep, rate) = (keep as f32, rate as f32);
    let (mut w, direction) = (Memory::of(w), Memory::of(direction));
    w.write().par_chunks_mut(CHUNK).zip(direction.read().par_chunks(CHUNK)).for_each(|(w, direction)| {
        vectorised(
            #[inline(always)]
            || {
                for (w, direction) in w.iter_mut().zip(direction) {
                    *w = *w * keep - rate * direction;
                }
            },
        );
    });
    w.tensor()
}

/// Frobenius norm in f64 steps on the CPU backend: no overflow at gradients of 1e30.
pub fn norm(x: &Tensor<2>) -> f64 {
    if !is_cpu(&x.device()) {
        return f64::from(x.clone().square().sum().sqrt().into_scalar::<f32>());
    }
    // A fixed partition, summed in its order: the same bits whatever the threads do.
    let sums: Vec<f64> = Memory::of(x.clone())
        .read()
        .par_chunks(CHUNK)
        .map(|part| part.iter().map(|x| f64::from(*x) * f64::from(*x)).sum())
        .collect();
    sums.into_iter().sum::<f64>().sqrt()
}
