//! Moments when the subspace is renewed.

use burn::tensor::{DType, Tensor};

use crate::projected::config::OnRenewal;
use crate::projected::parts::{Moments, StepParts};
use crate::projected::subspace::{Open, index_tensor};
use lowrank_kernels::ops::MatrixProduct;

/// Upper limit of squares when they are mixed.
const HUGE: f32 = 1e34;

impl StepParts<'_> {
    /// Moments in the coordinates of the new subspace.
    pub fn carry(&self, (m, v): Moments, before: &Open, time: usize) -> Moments {
        let axis = usize::from(self.right);
        if let (Some(old), Some(new)) = (before.subspace.indices(), self.subspace.subspace.indices()) {
            return (gather(m, axis, &old, &new), v.map(|v| gather(v, axis, &old, &new)));
        }
        let (Some(old), Some(new)) = (&before.columns, &self.subspace.columns) else { return (m, v) };
        let turn = old.clone().transpose().times(new.clone());
        let turned = |x: Tensor<2>, turn: &Tensor<2>| match self.right {
            true => x.times(turn.clone()),
            false => turn.clone().transpose().times(x),
        };
        let moved = turned(m.clone(), &turn);
        let v = match (v, self.c.on_renewal) {
            (None, _) => None,
            (Some(v), OnRenewal::Transport) => {
                let d1 = 1.0 - self.c.adam.beta_1.powf(time as f64);
                let d2 = 1.0 - self.c.adam.beta_2.powf(time as f64);
                // Infinite squares (of gradients above 1e19) would give infinity times zero here.
                let variance = v.div_scalar(d2).clamp_max(HUGE) - m.div_scalar(d1).square().clamp_max(HUGE);
                let mean = moved.clone().div_scalar(d1).square().clamp_max(HUGE);
                Some((turned(variance, &turn.square()) + mean).abs().mul_scalar(d2))
            }
            (Some(v), _) => Some(turned(v.clamp_max(HUGE), &turn).abs()),
        };
        (moved, v)
    }
}

/// Moves each vector's moments to its new place; those of vectors that are new start at 0.
fn gather(moment: Tensor<2>, axis: usize, old: &[i32], new: &[i32]) -> Tensor<2> {
    if old == new {
        return moment;
    }
    let mut shape = moment.dims();
    shape[axis] = 1;
    let device = moment.device();
    let zeros = Tensor::zeros(shape, (&device, DType::F32));
    let places = new.iter().map(|index| old.binary_search(index).unwrap_or(old.len()) as i32).collect();
    Tensor::cat(vec![moment, zeros], axis).select(axis, index_tensor(places, &device))
}
