//! The part of the gradient outside the subspace: kept for the next step, scaled, or moving the weights by itself.

use burn::tensor::{DType, Tensor};
use lowrank_kernels::elementwise::norm;

use crate::projected::config::{Granularity, Residual};
use crate::projected::inner::Inside;
use crate::projected::parts::StepParts;
use crate::projected::state::ProjectedState;
use crate::projected::subspace::{Open, Subspace};
use crate::state::error_feedback::{ErrorBuffer, ErrorFeedback};

/// A divisor of norms that may be 0.
const GUARD: f64 = 1e-8;

/// A remembered norm of this size or less counts as none: a zero gradient must not freeze the matrix.
const FORGOTTEN: f64 = 1e-12;

impl StepParts<'_> {
    /// Error feedback for the next step: the residual and, if configured, momentum that a renewal loses.
    pub fn keep_error(
        &self,
        low: Option<&Tensor<2>>,
        old: Option<Tensor<2>>,
        moved: Option<&Tensor<2>>,
        before: Option<&Open>,
    ) -> Option<ErrorBuffer> {
        let how = self.c.residual.feedback();
        if how == ErrorFeedback::None {
            return None;
        }
        let mut rest = self.g.clone();
        if let Some(low) = low {
            rest = rest - self.subspace.back(low);
        }
        if let (true, Some(old), Some(moved), Some(before)) = (self.c.error_of_momentum, old, moved, before) {
            let lost = before.back(&old) - self.subspace.back(moved);
            rest = rest + lost.mul_scalar(self.c.adam.beta_1 / (1.0 - self.c.adam.beta_1));
        }
        ErrorBuffer::keep(rest, how, self.c.error_levels)
    }

    /// Ratio of the inner optimizer's direction to the gradient: one factor per row on the right, one per column on the left, or a single
    /// one.
    fn scaling(&self, inside: &Inside) -> Tensor<2> {
        if self.c.granularity == Granularity::Matrix {
            let factor = norm(&inside.direction) / (norm(&inside.low) + GUARD);
            return Tensor::full([1, 1], factor as f32, (&self.g.device(), DType::F32));
        }
        let axis = usize::from(self.right);
        let norms = |x: &Tensor<2>| x.clone().square().sum_dim(axis).sqrt();
        norms(&inside.direction) / norms(&inside.low).add_scalar(GUARD)
    }

    /// The scaled residual, as in Fira.
    pub fn scaled_rest(&self, inside: &Inside, s: &mut ProjectedState) -> Tensor<2> {
        let inner = self.subspace.back(&inside.low);
        let inner = if self.c.residual == Residual::Scaled { inner.mul_scalar(self.c.scale) } else { inner };
        self.limited((self.g.clone() - inner) * self.scaling(inside), s)
    }

    /// The scaled gradient, as in APOLLO.
    pub fn scaled_gradient(&self, inside: &Inside, s: &mut ProjectedState) -> Tensor<2> {
        let scaled = self.g.clone() * self.scaling(inside);
        let root = self.c.scale.sqrt();
        match self.c.scale_front {
            true => self.limited(scaled.mul_scalar(root), s),
            false => self.limited(scaled, s).mul_scalar(root),
        }
    }

    /// Keeps the norm from growing faster than the limit.
    fn limited(&self, x: Tensor<2>, s: &mut ProjectedState) -> Tensor<2> {
        let limit = self.c.growth_limit;
        if limit == 0.0 {
            return x;
        }
        let now = norm(&x);
        let factor = match s.limiter_norm {
            Some(before) if before > FORGOTTEN => (now / (before + GUARD)).max(limit) / limit,
            _ => 1.0,
        };
        s.limiter_norm = Some(now / factor);
        if factor == 1.0 { x } else { x.div_scalar(factor) }
    }

    /// Stateless update outside the subspace.
    pub fn state_free(&self, inside: Option<&Inside>) -> Option<Tensor<2>> {
        if !matches!(self.c.residual, Residual::Sign | Residual::Sgd) {
            return None;
        }
        let rest = match (&self.subspace.subspace, inside) {
            (Subspace::Whole, _) => return None,
            (_, Some(inside)) => self.g.clone() - self.subspace.back(&inside.low),
            (_, None) => self.g.clone(),
        };
        if self.c.residual == Residual::Sgd {
            return Some(rest);
        }
        // In a full basis the residual is rounding error, whose sign would give a step of full size.
        let full = self.subspace.columns.as_ref().is_some_and(|columns| columns.dims()[0] == columns.dims()[1]);
        Some(match full {
            true => {
                let noise = self.g.clone().abs().max().mul_scalar(1e-6).unsqueeze::<2>();
                let quiet = rest.clone().abs().lower_equal(noise.expand(rest.dims()));
                rest.sign().mask_fill(quiet, 0.0)
            }
            false => rest.sign(),
        })
    }
}
