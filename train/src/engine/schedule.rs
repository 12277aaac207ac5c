//! Learning rate of each step.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Course after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    /// A cosine that falls to 0 and warms up again where a parameterization restarts.
    CosineRestarts,
}

/// Steps at which [`ScheduleKind::CosineRestarts`] falls to 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restarts {
    /// Steps between restarts; 0 for none.
    pub every: u64,
    /// Steps of linear warm-up after each.
    pub warmup_steps: u64,
    /// Offset of the cosine and the restarts in steps.
    pub adjust_steps: u64,
    /// True if restarts also happen within the first warm-up.
    pub in_warmup: bool,
}

impl ScheduleKind {
    /// Returns true if the learning rate depends on the number of steps of the whole run.
    pub fn needs_total(self) -> bool {
        self != Self::Constant
    }
}

/// Learning rate as a function of the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of linear warm-up; the first step already has `peak / warmup_steps`.
    pub warmup_steps: u64,
    /// Steps of the whole run; none if a time limit ends it.
    pub total_steps: Option<u64>,
    /// Last learning rate as a fraction of the peak.
    pub final_fraction: f64,
    /// Fraction of the run over which [`ScheduleKind::Wsd`] decays, 0 to 1.
    pub decay_fraction: f64,
    /// Steps at which [`ScheduleKind::CosineRestarts`] falls to 0.
    pub restarts: Restarts,
}

impl Schedule {
    /// Constant learning rate for a run without a fixed end.
    pub fn constant(peak: f64) -> Self {
        Self {
            kind: ScheduleKind::Constant,
            peak,
            warmup_steps: 0,
            total_steps: None,
            final_fraction: 0.0,
            decay_fraction: 0.0,
            restarts: Restarts::default(),
        }
    }

    /// Returns the learning rate of a step, counted from 1. Steps beyond the run keep the last rate.
    pub fn rate(&self, step: u64) -> f64 {
        if self.kind == ScheduleKind::CosineRestarts {
            return self.peak * self.jagged(step.clamp(1, self.total_steps.unwrap_or(u64::MAX).max(1)) - 1);
        }
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let total = self.total_steps.unwrap_or(u64::MAX);
        let decay_from = match self.kind {
            ScheduleKind::Constant => return self.peak,
            ScheduleKind::Cosine | ScheduleKind::Linear | ScheduleKind::CosineRestarts => self.warmup_steps,
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

    /// Jagged cosine of "ReLoRA: High-Rank Training Through Low-Rank Updates" (arXiv 2307.05695) after `done` steps, as
    /// a fraction of the peak. Unlike the other kinds it starts at 0.
    fn jagged(&self, done: u64) -> f64 {
        let Restarts { every, warmup_steps, adjust_steps, in_warmup } = self.restarts;
        let warmup = self.warmup_steps;
        let span = self.total_steps.unwrap_or(u64::MAX).saturating_sub(warmup).max(1) as f64;
        let cosine = |at: u64| {
            let turn = std::f64::consts::PI * (at as f64 - warmup as f64) / span;
            self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + turn.cos())
        };
        let first = |at: u64| at as f64 / warmup as f64;
        let at = if done < warmup { done } else { done + adjust_steps };
        let since = at.checked_rem(every).unwrap_or(0);
        let restarted = every > 0 && done >= every && since < warmup_steps;
        let rise = since as f64 / warmup_steps as f64;
        match (done < warmup, restarted) {
            (true, true) if in_warmup => first(at - since) * rise,
            (true, _) => first(at),
            (false, true) => cosine(at - since + warmup_steps) * rise,
            (false, false) => cosine(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule {
            kind,
            peak: 2.0,
            warmup_steps: 10,
            total_steps: Some(110),
            final_fraction: 0.1,
            decay_fraction: 0.2,
            restarts: Restarts { every: 20, warmup_steps: 4, adjust_steps: 0, in_warmup: false },
        }
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

    #[test]
    fn restarts_fall_to_0_and_come_back_to_the_cosine() {
        let schedule = schedule(ScheduleKind::CosineRestarts);
        let smooth = Schedule { restarts: Restarts::default(), ..schedule.clone() };
        for step in 1..=110 {
            let (rate, cosine) = (schedule.rate(step), smooth.rate(step));
            match (step - 1) % 20 {
                0 => assert_eq!(rate, 0.0, "{step}"),
                since if since < 4 && step > 20 => assert!(rate > 0.0 && rate < cosine, "{step}"),
                _ => assert_eq!(rate, cosine, "{step}"),
            }
        }
        assert!(schedule.rate(24) < schedule.rate(25) && schedule.rate(25) == smooth.rate(25));
    }

    #[test]
    fn restarts_inside_the_first_warm_up_are_asked_for() {
        let with = |in_warmup| Schedule {
            warmup_steps: 50,
            restarts: Restarts { in_warmup, ..schedule(ScheduleKind::CosineRestarts).restarts },
            ..schedule(ScheduleKind::CosineRestarts)
        };
        assert_eq!(with(false).rate(21), 2.0 * 0.4);
        let rates: Vec<f64> = (20..=25).map(|step| with(true).rate(step)).collect();
        let parts = [0.38, 0.0, 0.1, 0.2, 0.3, 0.48];
        assert!(rates.iter().zip(parts).all(|(rate, part)| (rate - 2.0 * part).abs() < 1e-12), "{rates:?}");
    }
}
