//! Time limit of a run.

/// Fractions of the time limit at which the number of steps that fit is estimated again. At the first one the duration
/// of a step is known and almost none of the learning-rate decay has passed.
const ESTIMATES: [f64; 7] = [0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9];

/// Time limit, which the learning rate follows: the schedule is adjusted to the steps that fit, so that it ends when
/// the run does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Clock {
    limit: f64,
    /// Number of estimates made so far.
    made: usize,
}

impl Clock {
    /// Creates a clock of `minutes` minutes, of which `seconds` seconds have passed; none for 0 minutes.
    pub fn new(minutes: f64, seconds: f64) -> Option<Self> {
        let limit = minutes * 60.0;
        (limit > 0.0).then(|| Self { limit, made: passed(seconds / limit) })
    }

    /// Returns true if the time is up.
    pub fn is_over(self, seconds: f64) -> bool {
        seconds >= self.limit
    }

    /// Returns true if this clock allows more than `minutes` minutes.
    pub fn is_longer_than(self, minutes: f64) -> bool {
        self.limit > minutes * 60.0
    }

    /// Remaining seconds.
    pub fn left(self, seconds: f64) -> f64 {
        (self.limit - seconds).max(0.0)
    }

    /// Estimated steps of the whole run after `step` steps in `seconds` seconds; none between the times of estimates.
    pub fn estimate(&mut self, step: u64, seconds: f64) -> Option<u64> {
        let made = passed(seconds / self.limit);
        if made == std::mem::replace(&mut self.made, made) || step == 0 {
            return None;
        }
        Some(self.fitting(step, seconds))
    }

    /// Steps of the whole run at the speed of the first `step` steps.
    pub fn fitting(self, step: u64, seconds: f64) -> u64 {
        step + (self.left(seconds) * step as f64 / seconds) as u64
    }
}

fn passed(share: f64) -> usize {
    ESTIMATES.iter().filter(|estimate| share >= **estimate).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_that_fit_follow_from_the_pace() {
        assert_eq!(Clock::new(0.0, 0.0), None);
        let mut clock = Clock::new(1.0, 0.0).unwrap();
        assert_eq!(clock.estimate(2, 1.0), None);
        assert_eq!(clock.estimate(6, 3.0), Some(120));
        assert_eq!(clock.estimate(7, 3.5), None);
        assert_eq!(clock.estimate(10, 30.0), Some(20));
        assert!(clock.is_over(60.0) && !clock.is_over(59.9));
        assert_eq!(clock.left(61.0), 0.0);
        let mut resumed = Clock::new(1.0, 31.0).unwrap();
        assert_eq!(resumed.estimate(12, 32.0), None);
        assert_eq!(resumed.estimate(18, 36.0), Some(30));
    }
}
