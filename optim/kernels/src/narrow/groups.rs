//! Values as small integers with a scale and a zero for each group, as Q-GaLore stores projectors and weights: "Q-GaLore: Quantized GaLore with
//! INT4 Projection and Layer-Adaptive Low-Rank Gradients" (Zhang et al., arXiv 2407.08296).

use rayon::prelude::*;

use super::draws::Draws;

/// Integers of groups of consecutive values, with the parameters to decode them.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedGroups {
    /// From 0 to `2^bits - 1`, one per element.
    pub codes: Vec<u8>,
    /// Value of a step, one per group.
    pub scales: Vec<f32>,
    /// Code of the value 0, one per group.
    pub zeros: Vec<f32>,
}

/// Smallest range of a group; a constant one would divide by zero.
const MIN_RANGE: f32 = 1e-5;

/// Rounding of a quotient to a code.
#[derive(Clone, Copy, Debug)]
pub enum Rounding {
    /// To the nearest, half to even.
    Nearest,
    /// Up or down at random, so that the mean is exact. A quotient on the grid stays: it may miss the whole number by rounding.
    Random(Draws),
}

/// `clamp(round(x / scale) + zero)` with `scale = max(hi - lo, 1e-5) / (2^bits - 1)` and `zero = clamp(-round(lo / scale))`.
///
/// The range of a group always includes 0, in contrast to the published code, whose codes saturate where all values have one sign. Groups have
/// a multiple of four values, but for the last.
pub fn quantise_groups(values: &[f32], bits: u32, group: usize, rounding: Rounding) -> QuantisedGroups {
    let count = values.len().div_ceil(group);
    let mut result =
        QuantisedGroups { codes: vec![0; values.len()], scales: vec![0.0; count], zeros: vec![0.0; count] };
    let QuantisedGroups { codes, scales, zeros } = &mut result;
    let parts = values.par_chunks(group).zip(codes.par_chunks_mut(group));
    let grids = scales.par_iter_mut().zip(zeros.par_iter_mut());
    parts.zip(grids).enumerate().for_each(|(number, ((values, codes), (scale, zero)))| {
        (*scale, *zero) = encode(values, bits, number * group, rounding, codes);
    });
    result
}

/// Encodes one group, whose first value has this index, and returns its scale and its zero.
pub fn encode(values: &[f32], bits: u32, first: usize, rounding: Rounding, codes: &mut [u8]) -> (f32, f32) {
    let top = ((1u32 << bits) - 1) as f32;
    let low = values.iter().copied().fold(0.0, f32::min);
    let high = values.iter().copied().fold(0.0, f32::max);
    // Codes cannot represent a value that is not finite: the scale of its group does.
    let is_finite = values.iter().all(|x| x.is_finite());
    let scale = if is_finite { (high - low).max(MIN_RANGE) / top } else { f32::NAN };
    let zero = if is_finite { (-(low / scale).round_ties_even()).clamp(0.0, top) } else { 0.0 };
    match rounding {
        Rounding::Nearest => {
            for (code, x) in codes.iter_mut().zip(values) {
                *code = ((x / scale).round_ties_even() + zero).clamp(0.0, top) as u8;
            }
        }
        Rounding::Random(draws) => {
            const PART: usize = 64;
            let mut drawn = [0u32; PART];
            for (number, (codes, values)) in codes.chunks_mut(PART).zip(values.chunks(PART)).enumerate() {
                let drawn = &mut drawn[..values.len()];
                draws.twenty_four(first + number * PART, drawn);
                for ((code, x), draw) in codes.iter_mut().zip(values).zip(drawn) {
                    let exact = x / scale;
                    let rounded = match (exact - exact.round()).abs() <= 2e-6 * exact.abs() {
                        true => exact.round(),
                        false => {
                            let below = exact.floor();
                            below + f32::from(u8::from((*draw as f32) < (exact - below) * (1 << 24) as f32))
                        }
                    };
                    *code = (rounded + zero).clamp(0.0, top) as u8;
                }
            }
        }
    }
    (scale, zero)
}

impl QuantisedGroups {
    /// `(code - zero) * scale`.
    pub fn restored(&self, group: usize) -> Vec<f32> {
        let groups = self.codes.chunks(group).zip(self.scales.iter().zip(&self.zeros));
        groups
            .flat_map(|(codes, (scale, zero))| codes.iter().map(move |code| (f32::from(*code) - zero) * scale))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::narrow::draws::Stream;

    fn random(step: u32) -> Rounding {
        Rounding::Random(Draws::new(0, Stream::TwentyFour, step, 0))
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        for bad in [f32::NAN, f32::INFINITY] {
            for rounding in [Rounding::Nearest, random(1)] {
                let restored = quantise_groups(&[1.0, bad, 2.0, 3.0, 1.0, 2.0], 8, 4, rounding).restored(4);
                assert!(
                    restored[..4].iter().all(|x| x.is_nan()) && restored[4..].iter().all(|x| x.is_finite()),
                    "{bad}"
                );
            }
        }
    }

    #[test]
    fn groups_of_one_sign_keep_their_values() {
        for bits in [4, 8] {
            for values in [vec![1.0; 8], vec![-3.0; 8], (1..9).map(|i| 5.0 + i as f32).collect(), vec![-0.5, -0.25]] {
                let groups = quantise_groups(&values, bits, 8, Rounding::Nearest);
                for (x, restored) in values.iter().zip(groups.restored(8)) {
                    assert!((x - restored).abs() <= 0.501 * groups.scales[0], "{bits} bits: {x} {restored}");
                }
            }
        }
    }

    #[test]
    fn values_are_within_half_a_step_and_constant_groups_finite() {
        let original: Vec<f32> = (0..64).map(|i| (i as f32 * 1.7).sin()).chain([0.25; 16]).chain([0.0; 16]).collect();
        for bits in [4, 8] {
            let groups = quantise_groups(&original, bits, 16, Rounding::Nearest);
            for (i, (restored, x)) in groups.restored(16).iter().zip(&original).enumerate() {
                assert!(restored.is_finite());
                let constant = i >= 64;
                // At the ends the rounding of the zero adds half a step.
                assert!(constant || (restored - x).abs() <= groups.scales[i / 16] * 1.01, "{bits} {i} {restored} {x}");
            }
        }
    }

    #[test]
    fn rounding_at_random_is_exact_on_average_and_leaves_values_on_the_grid() {
        let original = [-1.0f32, 0.3, 0.77, 1.0];
        let (mut sums, mut squares) = ([0f64; 4], [0f64; 4]);
        let draws = 10_000;
        for step in 0..draws {
            let restored = quantise_groups(&original, 4, 4, random(step)).restored(4);
            for i in 0..4 {
                sums[i] += f64::from(restored[i]);
                squares[i] += f64::from(restored[i]).powi(2);
            }
        }
        // The middle ones: the ends may be clamped.
        for i in 1..3 {
            let mean = sums[i] / f64::from(draws);
            let error = ((squares[i] / f64::from(draws) - mean * mean) / f64::from(draws)).sqrt();
            assert!((mean - f64::from(original[i])).abs() < 3.0 * error, "{mean} {}", original[i]);
        }
        let first = quantise_groups(&[0.0, 0.3, 0.77, 1.0], 8, 4, Rounding::Nearest);
        let again = quantise_groups(&first.restored(4), 8, 4, random(1));
        assert_eq!(first.codes, again.codes);
    }
}
