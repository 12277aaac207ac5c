//! The clock of a run.

/// Shares of the time at which the number of steps that fit is estimated anew. The first comes when a step's time is known and next to nothing of the
/// learning rate's decay has passed.
const ESTIMATES: [f64; 7] = [0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9];

/// A limit of time. The learning rate follows it: the schedule is laid out for the steps that fit, so that it ends when the clock ends the run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Clock {
    limit: f64,
    /// Number of estimates that have been made.
    made: usize,
}

impl Clock {
    /// A clock of so many minutes, of which some seconds have passed; none for 0 minutes.
    pub fn new(minutes: f64, seconds: f64) -> Option<Self> {
        let limit = minutes * 60.0;
        (limit > 0.0).then(|| Self { limit, made: passed(seconds / limit) })
    }

    /// Whether the time is up.
    pub fn is_over(self, seconds: f64) -> bool {
        seconds >= self.limit
    }

    /// Seconds that are left.
    pub fn left(self, seconds: f64) -> f64 {
        (self.limit - seconds).max(0.0)
    }

    /// Steps that the whole run will have after `step` steps in so many seconds; none between the times of estimates.
    pub fn estimate(&mut self, step: u64, seconds: f64) -> Option<u64> {
        let made = passed(seconds / self.limit);
        if made == std::mem::replace(&mut self.made, made) || step == 0 {
            return None;
        }
        Some(self.fitting(step, seconds))
    }

    /// Steps that the whole run will have at the pace of the first `step` steps.
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
