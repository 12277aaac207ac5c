use std::num::NonZeroU64;

/// Enough rounds for a balanced Feistel network to be a good pseudorandom permutation on small domains as well.
const ROUNDS: usize = 6;

/// Order in which samples are visited: a different permutation of `n` windows in each epoch.
///
/// It is a pure function of the seed and the position without memory or state, so a run that resumes at a position sees
/// exactly the same samples as without the interruption. The permutation is a Feistel network over the next power of
/// four, iterated until it reaches `0..n` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    n: u64,
    seed: u64,
    half_bits: u32,
}

impl Order {
    /// Creates an order over `n` windows.
    pub fn new(n: NonZeroU64, seed: u64) -> Self {
        let n = n.get();
        let bits = u64::BITS - (n - 1).leading_zeros();
        Self { n, seed, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Number of windows in one epoch.
    pub fn windows(&self) -> u64 {
        self.n
    }

    /// Returns the epoch and the window of the sample at `position`, counted from 0 over the whole run.
    pub fn window(&self, position: u64) -> (u64, u64) {
        let epoch = position / self.n;
        let key = mix(mix(self.seed) ^ epoch);
        let mut x = position % self.n;
        loop {
            x = self.permute(x, key);
            if x < self.n {
                return (epoch, x);
            }
        }
    }

    fn permute(&self, x: u64, key: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..ROUNDS as u64 {
            let f = mix(key ^ mix(right ^ (round << 56))) & mask;
            (left, right) = (right, left ^ f);
        }
        (left << self.half_bits) | right
    }
}

/// Finaliser of SplitMix64 (Steele, Lea and Flood, 2014) after its increment.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(n: u64, seed: u64) -> Order {
        Order::new(NonZeroU64::new(n).unwrap(), seed)
    }

    fn epoch(order: &Order, epoch: u64) -> Vec<u64> {
        let n = order.windows();
        (epoch * n..(epoch + 1) * n)
            .map(|p| {
                let (e, w) = order.window(p);
                assert_eq!(e, epoch);
                w
            })
            .collect()
    }

    #[test]
    fn each_epoch_visits_every_window_once() {
        for n in (1..70).chain([127, 128, 129, 1000, 4095, 4096, 4097, 65537]) {
            for e in [0, 1, 5] {
                let mut seen = epoch(&order(n, 7), e);
                seen.sort_unstable();
                assert!(seen.iter().copied().eq(0..n), "n = {n}, epoch {e}");
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let a = order(1000, 1);
        assert_ne!(epoch(&a, 0), epoch(&a, 1));
        assert_ne!(epoch(&a, 0), epoch(&order(1000, 2), 0));
        assert_eq!(epoch(&a, 3), epoch(&order(1000, 1), 3));
    }

    #[test]
    fn neighbours_and_positions_are_uncorrelated() {
        let n = 10_000u64;
        let w = epoch(&order(n, 3), 0);
        let fixed = w.iter().enumerate().filter(|(i, x)| *i as u64 == **x).count();
        let steps = w.windows(2).filter(|p| p[0].abs_diff(p[1]) < 10).count();
        let mean = (n as f64 - 1.0) / 2.0;
        let covariance: f64 = w.iter().enumerate().map(|(i, x)| (i as f64 - mean) * (*x as f64 - mean)).sum();
        let correlation = covariance / ((n as f64).powi(3) / 12.0);
        assert!(fixed < 10, "{fixed} windows stayed in place");
        assert!(steps < 60, "{steps} neighbours stayed neighbours");
        assert!(correlation.abs() < 0.05, "correlation {correlation}");
    }

    #[test]
    fn huge_counts_stay_inside() {
        for n in [1 << 40, (1 << 62) + 12345, u64::MAX] {
            let o = order(n, 9);
            for p in [0, 1, n / 2, n - 1] {
                assert!(o.window(p).1 < n);
            }
        }
    }
}
