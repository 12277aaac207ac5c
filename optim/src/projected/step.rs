//! The step of a projected optimizer.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::config::{Granularity, Inner, ProjectedConfig, ProjectorKind, RenewAt, Rest, States, Target};
use super::state::ProjectedState;
use crate::error_feedback::{ErrorBuffer, ErrorFeedback};
use crate::matrix::{MatrixRule, Place};
use crate::projector::{Projector, Renewal};
use crate::quantised::quantise_groups;
use crate::subspace::{Open, Subspace, index_tensor};
use lowrank_kernels::elementwise::{Adam, adam, descend, norm};
use lowrank_kernels::host::values;
use lowrank_kernels::random::generator;

/// A projected optimizer's rule for one matrix.
///
/// Matrices are taken as they are stored: Burn's linear layers hold `[d_in, d_out]`, so that for a square weight the standard side is the
/// transpose of a PyTorch run; the side can be chosen. A gradient with values that are not finite must be refused before
/// ([`GlobalNormClip`](crate::rules::GlobalNormClip) does): here it would end in the weights.
#[derive(Clone, Debug)]
pub struct Projected {
    config: ProjectedConfig,
    projector: Arc<dyn Projector>,
}

/// A divisor of norms that may be 0.
const GUARD: f64 = 1e-8;

/// A remembered norm of this size or less counts as none: a zero gradient must not freeze the matrix.
const FORGOTTEN: f64 = 1e-12;

/// Squares above this count as this much where they are mixed.
const HUGE: f32 = 1e34;

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

    fn fresh(&self, _shape: [usize; 2], place: Place, _device: &Device) -> ProjectedState {
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
        let (w, state) = match super::fused::fits(&self.config, &w, &state) {
            true => super::fused::step(&self.config, lr, w, g, state),
            false => self.composed(lr, w, g, state),
        };
        (self.on_grid(w, &state), state)
    }

    fn to_device(state: ProjectedState, device: &Device) -> ProjectedState {
        state.to_device(device)
    }
}

/// The parts of a step that stay the same within it.
struct Step<'a> {
    c: &'a ProjectedConfig,
    right: bool,
    /// The gradient, with what error feedback adds.
    g: Tensor<2>,
    subspace: Open,
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
        let g = match s.error.as_ref().and_then(ErrorBuffer::restored) {
            Some(error) => g + error,
            None => g,
        };
        let before = s.subspace.take().map(|subspace| subspace.open(shape, right, &device));
        let moments = s.moment_1.take().map(|m| (m.restored(), s.moment_2.take().map(|v| v.restored())));
        let renews = before.is_none() || due(c, s.time, s.gap);
        let subspace = match (renews, &before) {
            (false, Some(before)) => before.clone(),
            _ => self.renew(&g, &before, moments.as_ref().map(|(m, _)| m), right, &mut s).open(shape, right, &device),
        };
        let step = Step { c, right, g, subspace };
        let low = step.subspace.project(&step.g);

        let restarts = renews && c.states == States::Reset;
        let old = moments.clone();
        let moments = match (moments, &before, &low) {
            (Some(moments), _, Some(_)) if !renews || c.states == States::Keep => Some(moments),
            (Some(moments), Some(before), Some(_)) if !restarts => Some(step.carry(moments, before, s.moment_time)),
            _ => None,
        };
        if moments.is_none() {
            s.moment_time = 0;
        }
        s.error = step.keep_error(low.as_ref(), old.map(|(m, _)| m), moments.as_ref().map(|(m, _)| m), before.as_ref());

        s.time += 1;
        s.moment_time += 1;
        let lr_here = lr * c.proj_lr_scale;
        let inside = low.map(|low| step.inner(low, moments, s.moment_time));
        let (factor, scaling) = inside.as_ref().map_or((1.0, None), |inside| (inside.factor, Some(inside)));
        let mut direction = match (&c.rest, scaling) {
            (Rest::Gradient, Some(inside)) => Some(step.scaled_gradient(inside, &mut s)),
            (Rest::Scaled | Rest::ScaledPure, Some(inside)) => {
                let scaled = step.scaled_rest(inside, &mut s);
                Some(step.subspace.back(&inside.direction).mul_scalar(c.scale) + scaled)
            }
            (_, Some(inside)) => Some(step.subspace.back(&inside.direction).mul_scalar(c.scale)),
            (_, None) => None,
        };
        if let Some(rest) = step.state_free(scaling) {
            // The factor of the inside comes on top of the whole direction.
            let rest = rest.mul_scalar(c.inactive_lr_scale / factor);
            direction = Some(direction.map_or(rest.clone(), |direction| direction + rest));
        }
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
        let mixed = match (c.target, before, moment) {
            (Target::Momentum, Some(before), Some(m)) => {
                let momentum = before.back(m).mul_scalar(c.rho / (1.0 - c.adam.beta_1.powf(s.moment_time as f64)));
                Some(momentum + g.clone().mul_scalar(1.0 - c.rho))
            }
            _ => None,
        };
        let place = Place { key: s.key, number: s.number, count: s.count };
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

    /// Weights rounded at random to a grid of small integers, where the configuration wants it.
    fn on_grid(&self, w: Tensor<2>, s: &ProjectedState) -> Tensor<2> {
        let c = &self.config;
        if c.weight_bits == 0 {
            return w;
        }
        let (shape, device) = (w.dims(), w.device());
        // Apart from the draws of projectors, whose counts are small.
        let mut rng = generator(c.seed, s.key, 1 << 63 | s.time as u64);
        let groups = quantise_groups(&values(w), c.weight_bits, c.weight_group, Some(&mut rng));
        Tensor::from_data(TensorData::new(groups.restored(c.weight_group), shape), &device)
    }
}

/// Whether the subspace is renewed after so many steps.
pub(super) fn due(c: &ProjectedConfig, done: usize, gap: usize) -> bool {
    match c.renew_at {
        RenewAt::Completed => done.is_multiple_of(gap),
        RenewAt::Multiples => (done + 1).is_multiple_of(gap),
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

/// What the inner optimizer made of the low-rank gradient.
struct Inside {
    low: Tensor<2>,
    direction: Tensor<2>,
    /// On top of the learning rate: the correction of bias.
    factor: f64,
    moment_1: Tensor<2>,
    moment_2: Option<Tensor<2>>,
}

type Moments = (Tensor<2>, Option<Tensor<2>>);

impl Step<'_> {
    /// Moments in the coordinates of the new subspace.
    fn carry(&self, (m, v): Moments, before: &Open, time: usize) -> Moments {
        let axis = usize::from(self.right);
        if let (Some(old), Some(new)) = (before.subspace.indices(), self.subspace.subspace.indices()) {
            return (gather(m, axis, &old, &new), v.map(|v| gather(v, axis, &old, &new)));
        }
        let (Some(old), Some(new)) = (&before.columns, &self.subspace.columns) else { return (m, v) };
        let turn = old.clone().transpose().matmul(new.clone());
        let turned = |x: Tensor<2>, turn: &Tensor<2>| match self.right {
            true => x.matmul(turn.clone()),
            false => turn.clone().transpose().matmul(x),
        };
        let moved = turned(m.clone(), &turn);
        let v = match (v, self.c.states) {
            (None, _) => None,
            (Some(v), States::Transport) => {
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

    fn keep_error(
        &self,
        low: Option<&Tensor<2>>,
        old: Option<Tensor<2>>,
        moved: Option<&Tensor<2>>,
        before: Option<&Open>,
    ) -> Option<ErrorBuffer> {
        let how = match self.c.rest {
            Rest::Full => ErrorFeedback::Full,
            Rest::Quantised => ErrorFeedback::Quantised { levels: self.c.error_levels },
            _ => return None,
        };
        let mut rest = self.g.clone();
        if let Some(low) = low {
            rest = rest - self.subspace.back(low);
        }
        if let (true, Some(old), Some(moved), Some(before)) = (self.c.error_of_momentum, old, moved, before) {
            let lost = before.back(&old) - self.subspace.back(moved);
            rest = rest + lost.mul_scalar(self.c.adam.beta_1 / (1.0 - self.c.adam.beta_1));
        }
        ErrorBuffer::keep(rest, how)
    }

    fn inner(&self, low: Tensor<2>, moments: Option<Moments>, time: usize) -> Inside {
        let c = self.c;
        let (m, v) = moments.unwrap_or_else(|| (low.zeros_like(), None));
        let c1 = 1.0 - c.adam.beta_1.powf(time as f64);
        let c2 = 1.0 - c.adam.beta_2.powf(time as f64);
        let (direction, factor, moment_1, moment_2) = match c.inner {
            Inner::Adam | Inner::AdamLegacy => {
                let v = v.unwrap_or_else(|| low.zeros_like());
                let epsilon = if c.inner == Inner::Adam { c.adam.epsilon * c2.sqrt() } else { c.adam.epsilon };
                let f = Adam::new(c.adam.beta_1, c.adam.beta_2, epsilon);
                let (direction, m, v) = adam(low.clone(), m, v, f);
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

    /// How the inner optimizer changed the size of the gradient: one factor a row on the right, one a column on the left, or one.
    fn scaling(&self, inside: &Inside) -> Tensor<2> {
        if self.c.granularity == Granularity::Matrix {
            let factor = norm(&inside.direction) / (norm(&inside.low) + GUARD);
            return Tensor::full([1, 1], factor as f32, (&self.g.device(), DType::F32));
        }
        let axis = usize::from(self.right);
        let norms = |x: &Tensor<2>| x.clone().square().sum_dim(axis).sqrt();
        norms(&inside.direction) / norms(&inside.low).add_scalar(GUARD)
    }

    fn scaled_rest(&self, inside: &Inside, s: &mut ProjectedState) -> Tensor<2> {
        let inner = self.subspace.back(&inside.low);
        let inner = if self.c.rest == Rest::Scaled { inner.mul_scalar(self.c.scale) } else { inner };
        self.limited((self.g.clone() - inner) * self.scaling(inside), s)
    }

    fn scaled_gradient(&self, inside: &Inside, s: &mut ProjectedState) -> Tensor<2> {
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

    /// What moves the weights outside the subspace without a state.
    fn state_free(&self, inside: Option<&Inside>) -> Option<Tensor<2>> {
        if !matches!(self.c.rest, Rest::Sign | Rest::Sgd) {
            return None;
        }
        let rest = match (&self.subspace.subspace, inside) {
            (Subspace::Whole, _) => return None,
            (_, Some(inside)) => self.g.clone() - self.subspace.back(&inside.low),
            (_, None) => self.g.clone(),
        };
        if self.c.rest == Rest::Sgd {
            return Some(rest);
        }
        // In a full basis the rest is rounding, whose sign would be a step of full size.
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
