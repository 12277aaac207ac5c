//! Element-wise parts of the optimizers: one pass over memory on the CPU backend, tensor operations elsewhere.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::host::{Memory, is_cpu};
use crate::vectorised::vectorised;

/// Elements that one task processes.
pub const CHUNK: usize = 1 << 14;

/// Adam's moments and direction.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// Decay of the first moment.
    pub beta_1: f32,
    /// Decay of the second moment.
    pub beta_2: f32,
    /// One minus the first decay, rounded once: in f32 the difference would lose five digits.
    pub share_1: f32,
    /// One minus the second decay.
    pub share_2: f32,
    /// Factor of the root of the second moment: its correction of bias.
    pub root: f32,
    /// Added to that.
    pub epsilon: f32,
}

impl Adam {
    /// Adam with these decays and this epsilon, without a correction of bias.
    pub fn new(beta_1: f64, beta_2: f64, epsilon: f64) -> Self {
        Self {
            beta_1: beta_1 as f32,
            beta_2: beta_2 as f32,
            share_1: (1.0 - beta_1) as f32,
            share_2: (1.0 - beta_2) as f32,
            root: 1.0,
            epsilon: epsilon as f32,
        }
    }

    /// Advances the moments of one element with its gradient and returns `m / (root sqrt(v) + epsilon)`.
    #[inline(always)]
    pub fn direction(self, g: f32, m: &mut f32, v: &mut f32) -> f32 {
        *m = self.beta_1 * *m + self.share_1 * g;
        *v = self.beta_2 * *v + self.share_2 * (g * g);
        *m / (v.sqrt() * self.root + self.epsilon)
    }

    /// As [`Adam::direction`], composed of tensor operations.
    fn composed<const D: usize>(self, g: Tensor<D>, m: Tensor<D>, v: Tensor<D>) -> [Tensor<D>; 3] {
        let m = m.mul_scalar(self.beta_1) + g.clone().mul_scalar(self.share_1);
        let v = v.mul_scalar(self.beta_2) + g.square().mul_scalar(self.share_2);
        [m.clone() / v.clone().sqrt().mul_scalar(self.root).add_scalar(self.epsilon), m, v]
    }
}

/// Advances the moments with a gradient; returns the direction, `m` and `v`.
pub fn adam<const D: usize>(g: Tensor<D>, m: Tensor<D>, v: Tensor<D>, f: Adam) -> [Tensor<D>; 3] {
    if !is_cpu(&g.device()) {
        return f.composed(g, m, v);
    }
    let (mut g, mut m, mut v) = (Memory::of(g), Memory::of(m), Memory::of(v));
    let moments = m.write().par_chunks_mut(CHUNK).zip(v.write().par_chunks_mut(CHUNK));
    g.write().par_chunks_mut(CHUNK).zip(moments).for_each(|(g, (m, v))| {
        vectorised(
            #[inline(always)]
            || {
                for (g, (m, v)) in g.iter_mut().zip(m.iter_mut().zip(v.iter_mut())) {
                    *g = f.direction(*g, m, v);
                }
            },
        );
    });
    [g.tensor(), m.tensor(), v.tensor()]
}

/// Adam's direction and its effect on a weight: `w keep - rate direction`.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// The direction.
    pub adam: Adam,
    /// Part of the weight that remains after its decay.
    pub keep: f32,
    /// Length of the step.
    pub rate: f32,
}

impl AdamW {
    /// Steps the elements of a weight and advances their moments.
    #[inline(always)]
    pub fn step(self, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for ((w, g), (m, v)) in w.iter_mut().zip(g).zip(m.iter_mut().zip(v.iter_mut())) {
            *w = *w * self.keep - self.rate * self.adam.direction(*g, m, v);
        }
    }

    fn composed<const D: usize>(self, w: Tensor<D>, g: Tensor<D>, m: Tensor<D>, v: Tensor<D>) -> [Tensor<D>; 3] {
        let [direction, m, v] = self.adam.composed(g, m, v);
        [w.mul_scalar(self.keep) - direction.mul_scalar(self.rate), m, v]
    }
}

/// Steps a weight and advances its moments; returns the weight, `m` and `v`.
pub fn adamw<const D: usize>(w: Tensor<D>, g: Tensor<D>, m: Tensor<D>, v: Tensor<D>, f: AdamW) -> [Tensor<D>; 3] {
    if !is_cpu(&w.device()) {
        return f.composed(w, g, m, v);
    }
    let (mut w, g, mut m, mut v) = (Memory::of(w), Memory::of(g), Memory::of(m), Memory::of(v));
    let moments = m.write().par_chunks_mut(CHUNK).zip(v.write().par_chunks_mut(CHUNK));
    w.write().par_chunks_mut(CHUNK).zip(g.read().par_chunks(CHUNK)).zip(moments).for_each(|((w, g), (m, v))| {
        vectorised(
            #[inline(always)]
            || f.step(w, g, m, v),
        );
    });
    [w.tensor(), m.tensor(), v.tensor()]
}

/// `w * keep - rate * direction`, in place if the weights are not shared.
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
    // A fixed partition, summed in its order: the same bits for any number of threads.
    let sums: Vec<f64> = Memory::of(x.clone())
        .read()
        .par_chunks(CHUNK)
        .map(|part| part.iter().map(|x| f64::from(*x) * f64::from(*x)).sum())
        .collect();
    sums.into_iter().sum::<f64>().sqrt()
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::host::values;
    use crate::random::normal_matrix;
    use burn::tensor::Device;

    #[test]
    fn the_fused_forms_equal_the_composed_ones() {
        let draw = |key| normal_matrix(0, key, [251, 199], &Device::default());
        let adam_of = Adam { root: 2.5, ..Adam::new(0.9, 0.999, 1e-8) };
        let f = AdamW { adam: adam_of, keep: 0.9, rate: 0.01 };
        for scale in [1.0, 1e-20, 1e15] {
            let (g, m, v) = (draw(1) * scale, draw(2), draw(3).square());
            let pairs = [
                (adam(g.clone(), m.clone(), v.clone(), adam_of), adam_of.composed(g.clone(), m.clone(), v.clone())),
                (adamw(draw(4), g.clone(), m.clone(), v.clone(), f), f.composed(draw(4), g, m, v)),
            ];
            for (ours, expected) in pairs.into_iter().flat_map(|(ours, expected)| ours.into_iter().zip(expected)) {
                for (ours, expected) in values(ours).iter().zip(values(expected)) {
                    assert!((ours - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{ours} {expected}");
                }
            }
        }
    }
}
