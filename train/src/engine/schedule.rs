//! The learning rate of each step.

use serde::{Deserialize, Serialize};

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to the final fraction.
    #[default]
    Cosine,
    /// A straight line from the peak to the final fraction.
    Linear,
    /// The peak until the end.
    Constant,
    /// Warm-up, stable, decay: the peak, then a straight line to the final fraction over the last part of the run.
    Wsd,
}

impl ScheduleKind {
    /// Whether the rate depends on how many steps the whole run has.
    pub fn needs_total(self) -> bool {
        self != Self::Constant
    }
}

/// The learning rate as a function of the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of linear warm-up; the first step already has `peak / warmup_steps`.
    pub warmup_steps: u64,
    /// Steps of the whole run; none when it ends by the clock.
    pub total_steps: Option<u64>,
    /// Last learning rate as a fraction of the peak.
    pub final_fraction: f64,
    /// Part of the run that [`ScheduleKind::Wsd`] decays over, 0 to 1.
    pub decay_fraction: f64,
}

impl Schedule {
    /// The rate of a step, counted from 1. Steps beyond the run keep the last rate.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let total = self.total_steps.unwrap_or(u64::MAX);
        let decay_from = match self.kind {
            ScheduleKind::Constant => return self.peak,
            ScheduleKind::Cosine | ScheduleKind::Linear => self.warmup_steps,
            ScheduleKind::Wsd => {
                let decay_steps = (self.decay_fraction * total as f64).round() as u64;
                total.saturating_sub(decay_steps).max(self.warmup_steps)
            }
        };
        let span = total.saturating_sub(decay_from).max(1);
        let progress = (step.saturating_sub(decay_from) as f64 / span as f64).min(1.0);
        let remaining = match self.kind {
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            _ => 1.0 - progress,
        };
        self.peak * (self.final_fraction + (1.0 - self.final_fraction) * remaining)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule { kind, peak: 2.0, warmup_steps: 10, total_steps: Some(110), final_fraction: 0.1, decay_fraction: 0.2 }
    }

    #[test]
    fn warms_up_in_a_straight_line_to_the_peak() {
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Constant, ScheduleKind::Wsd] {
            assert_eq!(schedule(kind).rate(1), 0.2);
            assert_eq!(schedule(kind).rate(5), 1.0);
            assert_eq!(schedule(kind).rate(10), 2.0);
        }
    }

    #[test]
    fn each_kind_passes_through_its_known_points() {
        let near = |kind, step, rate: f64| {
            let found = schedule(kind).rate(step);
            assert!((found - rate).abs() < 1e-12, "{kind:?} at {step}: {found}");
        };
        near(ScheduleKind::Cosine, 60, 2.0 * 0.55);
        near(ScheduleKind::Cosine, 110, 0.2);
        near(ScheduleKind::Linear, 35, 2.0 * (0.1 + 0.9 * 0.75));
        near(ScheduleKind::Linear, 110, 0.2);
        near(ScheduleKind::Constant, 110, 2.0);
        near(ScheduleKind::Wsd, 88, 2.0);
        near(ScheduleKind::Wsd, 99, 2.0 * 0.55);
        near(ScheduleKind::Wsd, 110, 0.2);
        near(ScheduleKind::Cosine, 500, 0.2);
    }

    #[test]
    fn a_run_without_warm_up_starts_near_the_peak() {
        let schedule = Schedule { warmup_steps: 0, ..schedule(ScheduleKind::Linear) };
        assert!(schedule.rate(1) > 1.98);
    }
}
