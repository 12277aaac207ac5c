//! The step of a projected optimizer.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels::elementwise::{descend, norm};
use lowrank_kernels::host::values;
use lowrank_kernels::narrow::draws::{Draws, Stream};
use lowrank_kernels::narrow::groups::{Rounding, quantise_groups};

use crate::matrix::MatrixRule;
use crate::matrix_id::MatrixId;
use crate::projected::config::{OnRenewal, ProjectFrom, ProjectedConfig, ProjectorKind, Residual};
use crate::projected::fused;
use crate::projected::idle::without_idle;
use crate::projected::inner::Inside;
use crate::projected::parts::{Moments, StepParts};
use crate::projected::projector::{Projector, Renewal};
use crate::projected::state::ProjectedState;
use crate::projected::subspace::{Open, Subspace};
use crate::state::error_feedback::ErrorBuffer;

/// A projected optimizer's rule for one matrix.
///
/// Matrices are taken as they are stored: Burn's linear layers hold `[d_in, d_out]`, so that for a square weight the standard side is the
/// transpose of a PyTorch run; the side can be chosen. A gradient with values that are not finite must be rejected before
/// ([`GlobalNormClip`](crate::GlobalNormClip) does): here it would end in the weights.
#[derive(Clone, Debug)]
pub struct Projected {
    config: ProjectedConfig,
    projector: Arc<dyn Projector>,
}

/// A divisor of norms that may be 0.
const GUARD: f64 = 1e-8;

impl Projected {
    pub(super) fn new(config: ProjectedConfig, projector: Arc<dyn Projector>) -> Self {
        Self { config, projector }
    }

    /// The configuration.
    pub fn config(&self) -> &ProjectedConfig {
        &self.config
    }
}

impl MatrixRule for Projected {
    type State = ProjectedState;

    fn takes(&self, shape: [usize; 2]) -> bool {
        self.config.projects(shape)
    }

    fn fresh(&self, _shape: [usize; 2], place: MatrixId, _device: &Device) -> ProjectedState {
        ProjectedState {
            time: 0,
            moment_time: 0,
            renewals: 0,
            gap: self.config.update_proj_gap,
            key: place.key,
            number: place.number,
            count: place.count,
            subspace: None,
            moment_1: None,
            moment_2: None,
            error: None,
            limiter_norm: None,
            cosines: None,
        }
    }

    fn step(&self, lr: f64, w: Tensor<2>, g: Tensor<2>, state: ProjectedState) -> (Tensor<2>, ProjectedState) {
        let (w, state) = if fused::fits(&self.config, &w, &state) {
            fused::step(&self.config, lr, w, g, state)
        } else {
            self.composed(lr, w, g, state)
        };
        (self.on_grid(w, &state), state)
    }

    fn to_device(state: ProjectedState, device: &Device) -> ProjectedState {
        state.to_device(device)
    }
}

impl Projected {
    pub(super) fn composed(
        &self,
        lr: f64,
        w: Tensor<2>,
        g: Tensor<2>,
        mut s: ProjectedState,
    ) -> (Tensor<2>, ProjectedState) {
        let c = &self.config;
        let (shape, device) = (w.dims(), w.device());
        let right = c.right(shape);
        let before = s.subspace.take().map(|subspace| subspace.open(shape, right, &device));
        let moments = s.moment_1.take().map(|m| (m.restored(), s.moment_2.take().map(|v| v.restored())));
        let g = match (s.error.as_ref().and_then(ErrorBuffer::restored), &moments) {
            (Some(error), Some((m, _))) if !right && matches!(c.residual, Residual::Quantised) => {
                let error = without_idle(error, &g, m);
                g + error
            }
            (Some(error), _) => g + error,
            (None, _) => g,
        };
        let renews = before.is_none() || c.renews(s.time, s.gap);
        let subspace = match (renews, &before) {
            (false, Some(before)) => before.clone(),
            _ => self.renew(&g, &before, moments.as_ref().map(|(m, _)| m), right, &mut s).open(shape, right, &device),
        };
        let step = StepParts { c, right, g, subspace };
        let low = step.subspace.project(&step.g);

        let old = moments.as_ref().map(|(m, _)| m.clone());
        let moments = moments.filter(|_| low.is_some());
        let moments = if renews { step.renewed(moments, before.as_ref(), s.moment_time) } else { moments };
        if moments.is_none() {
            s.moment_time = 0;
        }
        s.error = step.keep_error(low.as_ref(), old, moments.as_ref().map(|(m, _)| m), before.as_ref());

        s.time += 1;
        s.moment_time += 1;
        let lr_here = lr * c.proj_lr_scale;
        let inside = low.map(|low| step.inner(low, moments, s.moment_time));
        let factor = inside.as_ref().map_or(1.0, |inside| inside.factor);
        let direction = step.direction(inside.as_ref(), &mut s);
        let decay = 1.0 - lr * c.adam.weight_decay;
        let (keep, rate) = if c.decay_after { (decay, decay) } else { (decay, 1.0) };
        let w = match direction {
            Some(direction) => descend(w, keep, rate * lr_here * factor, direction),
            None => w.mul_scalar(keep),
        };

        let storage = c.storage();
        if let Some(inside) = inside {
            s.moment_1 = Some(storage.keep(inside.moment_1, true));
            s.moment_2 = inside.moment_2.map(|v| storage.keep(v, false));
        }
        s.subspace = Some(step.subspace.subspace);
        (w, s)
    }

    fn renew(
        &self,
        g: &Tensor<2>,
        before: &Option<Open>,
        moment: Option<&Tensor<2>>,
        right: bool,
        s: &mut ProjectedState,
    ) -> Subspace {
        let c = &self.config;
        let rank = c.rank_of(g.dims());
        if rank == 0 && c.projector != ProjectorKind::Block {
            return Subspace::Nothing;
        }
        let mixed = match (c.project_from, before, moment) {
            (ProjectFrom::Momentum, Some(before), Some(m)) => {
                let momentum = before.back(m).mul_scalar(c.rho / (1.0 - c.adam.beta_1.powf(s.moment_time as f64)));
                Some(momentum + g.clone().mul_scalar(1.0 - c.rho))
            }
            _ => None,
        };
        let place = MatrixId { key: s.key, number: s.number, count: s.count };
        let previous = before.as_ref().map(|before| &before.subspace);
        let gradient = mixed.as_ref().unwrap_or(g);
        let renewal = Renewal { gradient, right, rank, previous, seed: c.seed, place, count: s.renewals };
        let subspace = self.projector.choose(&renewal);
        s.renewals += 1;
        if c.lazy_queue > 0
            && let Some(previous) = previous
        {
            self.lengthen(previous, &subspace, g, right, s);
        }
        subspace
    }

    /// Makes the gap longer where the first direction hardly moves.
    fn lengthen(&self, previous: &Subspace, now: &Subspace, g: &Tensor<2>, right: bool, s: &mut ProjectedState) {
        let (c, device) = (&self.config, g.device());
        let n = g.dims()[usize::from(right)];
        let first = |subspace: &Subspace| subspace.columns(n, &device).map(|columns| columns.narrow(1, 0, 1));
        let (Some(a), Some(b)) = (first(previous), first(now)) else { return };
        let length = norm(&a) * norm(&b);
        let cosine = f64::from((a * b).sum().into_scalar::<f32>()) / length.max(GUARD);
        let mut queue = s.cosines.take().map(values).unwrap_or_default();
        s.gap = longer_gap(&mut queue, cosine as f32, s.gap, c.lazy_queue, c.cos_threshold, c.gap_growth);
        let count = queue.len();
        s.cosines = Some(Tensor::from_data(TensorData::new(queue, [count]), &device));
    }

    /// Weights rounded at random to a grid of small integers, if configured.
    fn on_grid(&self, w: Tensor<2>, s: &ProjectedState) -> Tensor<2> {
        let c = &self.config;
        if c.weight_bits == 0 {
            return w;
        }
        let (shape, device) = (w.dims(), w.device());
        let rounding = Rounding::Random(Draws::new(c.seed, Stream::TwentyFour, s.time as u32, s.key));
        let groups = quantise_groups(&values(w), c.weight_bits, c.weight_group, rounding);
        Tensor::from_data(TensorData::new(groups.restored(c.weight_group), shape), &device)
    }
}

impl StepParts<'_> {
    /// Moments after a renewal.
    fn renewed(&self, moments: Option<Moments>, before: Option<&Open>, time: usize) -> Option<Moments> {
        match self.c.on_renewal {
            OnRenewal::Keep => moments,
            OnRenewal::Reset => None,
            OnRenewal::Rotate | OnRenewal::Transport => Some(self.carry(moments?, before?, time)),
        }
    }

    /// Direction of the weights, for a step by the learning rate times the factor of the inner update.
    fn direction(&self, inside: Option<&Inside>, s: &mut ProjectedState) -> Option<Tensor<2>> {
        let c = self.c;
        let direction = inside.map(|inside| match c.residual {
            Residual::Gradient => self.scaled_gradient(inside, s),
            Residual::Scaled | Residual::ScaledPure => {
                let scaled = self.scaled_rest(inside, s);
                self.subspace.back(&inside.direction).mul_scalar(c.scale) + scaled
            }
            _ => self.subspace.back(&inside.direction).mul_scalar(c.scale),
        });
        let Some(rest) = self.state_free(inside) else { return direction };
        // The factor of the inner update multiplies the whole direction.
        let rest = rest.mul_scalar(c.inactive_lr_scale / inside.map_or(1.0, |inside| inside.factor));
        Some(direction.map_or(rest.clone(), |direction| direction + rest))
    }
}

/// The gap after a renewal with this cosine: `growth` times longer when the queue is full and its mean at the threshold or above.
pub fn longer_gap(
    queue: &mut Vec<f32>,
    cosine: f32,
    gap: usize,
    length: usize,
    threshold: f64,
    growth: usize,
) -> usize {
    queue.push(cosine);
    if queue.len() > length {
        queue.remove(0);
    }
    let mean = queue.iter().map(|cosine| f64::from(*cosine)).sum::<f64>() / queue.len() as f64;
    if queue.len() == length && mean >= threshold { gap.saturating_mul(growth) } else { gap }
}
