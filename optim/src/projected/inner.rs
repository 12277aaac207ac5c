//! The optimizer inside the subspace.

use burn::tensor::Tensor;
use lowrank_kernels::elementwise::{Adam, adam};

use crate::projected::config::Inner;
use crate::projected::parts::{Moments, StepParts};

/// Result of the inner optimizer on the low-rank gradient.
pub struct Inside {
    pub low: Tensor<2>,
    pub direction: Tensor<2>,
    /// Additional factor of the learning rate: the bias correction.
    pub factor: f64,
    pub moment_1: Tensor<2>,
    pub moment_2: Option<Tensor<2>>,
}

impl StepParts<'_> {
    /// Advances the moments with the low-rank gradient.
    pub fn inner(&self, low: Tensor<2>, moments: Option<Moments>, time: usize) -> Inside {
        let c = self.c;
        let (m, v) = moments.unwrap_or_else(|| (low.zeros_like(), None));
        let c1 = 1.0 - c.adam.beta_1.powf(time as f64);
        let c2 = 1.0 - c.adam.beta_2.powf(time as f64);
        let (direction, factor, moment_1, moment_2) = match c.inner {
            Inner::Adam | Inner::AdamLegacy => {
                let v = v.unwrap_or_else(|| low.zeros_like());
                let epsilon = if c.inner == Inner::Adam { c.adam.epsilon * c2.sqrt() } else { c.adam.epsilon };
                let f = Adam::new(c.adam.beta_1, c.adam.beta_2, epsilon);
                let [direction, m, v] = adam(low.clone(), m, v, f);
                (direction, c2.sqrt() / c1, m, Some(v))
            }
            Inner::Lion => {
                let mix = |m: Tensor<2>, beta: f64| m.mul_scalar(beta) + low.clone().mul_scalar(1.0 - beta);
                (mix(m.clone(), c.adam.beta_1).sign(), 1.0, mix(m, c.adam.beta_2), None)
            }
            Inner::Momentum => {
                let m = m.mul_scalar(c.adam.beta_1) + low.clone();
                (m.clone(), 1.0, m, None)
            }
        };
        Inside { low, direction, factor, moment_1, moment_2 }
    }
}
