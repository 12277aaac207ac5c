//! Quantiles of magnitudes by counting instead of sorting.

/// Buckets of the upper 16 bits of a magnitude, whose sign is 0.
const UPPER: usize = 1 << 15;
/// Values of the lower 16 bits.
const LOWER: usize = 1 << 16;

/// Position of a quantile among `count` sorted values, and the fraction of the way to the next one.
pub(super) fn position(count: usize, quantile: f64) -> (usize, f64) {
    let exact = quantile * (count.max(1) - 1) as f64;
    (exact.floor() as usize, exact - exact.floor())
}

/// Number of magnitudes in each bucket of their upper bits. Magnitudes of floats have the order of their bits.
#[derive(Clone)]
pub(super) struct Upper(Vec<u32>);

impl Default for Upper {
    fn default() -> Self {
        Self(vec![0; UPPER])
    }
}

impl Upper {
    pub fn add(&mut self, values: &[f32]) {
        for value in values {
            self.0[(value.abs().to_bits() >> 16) as usize] += 1;
        }
    }

    pub fn plus(mut self, other: &Self) -> Self {
        self.0.iter_mut().zip(&other.0).for_each(|(sum, more)| *sum += more);
        self
    }

    /// The buckets of the two values around a position of the sorted magnitudes.
    pub fn around(&self, (first, _): (usize, f64)) -> Lower {
        let count: usize = self.0.iter().map(|count| *count as usize).sum();
        let find = |place: usize| {
            let mut before = 0;
            for (bucket, count) in self.0.iter().enumerate() {
                if before + *count as usize > place {
                    return (bucket as u32, place - before);
                }
                before += *count as usize;
            }
            (0, 0)
        };
        let places = [first, (first + 1).min(count.saturating_sub(1))].map(find);
        Lower { places, counts: [vec![0; LOWER], vec![0; LOWER]] }
    }
}

/// Number of magnitudes for each value of the lower bits, in the buckets of two values.
#[derive(Clone)]
pub(super) struct Lower {
    /// Bucket, and position inside of it.
    places: [(u32, usize); 2],
    counts: [Vec<u32>; 2],
}

impl Lower {
    pub fn add(&mut self, values: &[f32]) {
        for value in values {
            let bits = value.abs().to_bits();
            for (counts, (bucket, _)) in self.counts.iter_mut().zip(self.places) {
                if bits >> 16 == bucket {
                    counts[(bits & 0xffff) as usize] += 1;
                }
            }
        }
    }

    pub fn plus(mut self, other: &Self) -> Self {
        for (sums, more) in self.counts.iter_mut().zip(&other.counts) {
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
        self
    }

    /// The quantile: the two values, interpolated.
    pub fn quantile(&self, (_, fraction): (usize, f64)) -> f64 {
        let [low, high] = [0, 1].map(|number| {
            let (bucket, place) = self.places[number];
            let mut before = 0;
            let found = self.counts[number].iter().position(|count| {
                before += *count as usize;
                before > place
            });
            f64::from(f32::from_bits(bucket << 16 | found.unwrap_or_default() as u32))
        });
        if fraction == 0.0 { low } else { low + (high - low) * fraction }
    }
}

/// Quantile of the magnitudes of values, with linear interpolation between the two nearest.
pub fn quantile_of_magnitudes(values: &[f32], quantile: f64) -> f64 {
    let position = position(values.len(), quantile);
    let mut upper = Upper::default();
    upper.add(values);
    let mut lower = upper.around(position);
    lower.add(values);
    lower.quantile(position)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::random;

    #[test]
    fn counted_quantiles_equal_those_of_sorted_values() {
        for count in [1, 2, 7, 1000] {
            let mut values = random(&[count], 5);
            // Ties, zeros of both signs, and values of very different sizes.
            values.iter_mut().step_by(3).for_each(|value| *value = -0.25);
            values.iter_mut().step_by(5).for_each(|value| *value *= 1e-20);
            values[0] = -0.0;
            let mut sorted: Vec<f64> = values.iter().map(|value| f64::from(value.abs())).collect();
            sorted.sort_by(f64::total_cmp);
            for quantile in [0.0, 0.1, 0.25, 0.5, 0.77, 0.999] {
                let (place, fraction) = position(count, quantile);
                let next = sorted[(place + 1).min(count - 1)];
                let expected = sorted[place] + (next - sorted[place]) * fraction;
                assert_eq!(quantile_of_magnitudes(&values, quantile), expected, "{count} {quantile}");
            }
        }
    }
}
