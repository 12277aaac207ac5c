//! Values rounded to bf16: to the nearest, at random, or with what rounding cut off.
//!
//! "Revisiting BFloat16 Training" (Zamirai et al., arXiv 2010.06192) for stochastic rounding and compensation, "FlashOptim: Optimizers for
//! Memory Efficient Training" (Gonzalez Ortiz et al., arXiv 2602.23349) for the correction of 8 or 16 bits.

/// The f32 with the bits of a bf16.
#[inline(always)]
pub fn widened(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

/// The nearest bf16, of two equally near ones that with an even last bit. NaN stays NaN.
#[inline(always)]
pub fn nearest(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    if x.is_nan() { quiet } else { rounded }
}

/// One of the two bf16 around a finite value, so that the mean over all draws is the value itself. Beyond the largest bf16 it is that one;
/// infinity and NaN stay.
#[inline(always)]
pub fn stochastic(x: f32, draw: u16) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(u32::from(draw)) >> 16) as u16;
    // The largest finite number and infinity are neighbours.
    let finite = if rounded & 0x7fff == 0x7f80 { rounded - 1 } else { rounded };
    if x.is_finite() { finite } else { nearest(x) }
}

/// Half the distance from a bf16 to the next.
#[inline(always)]
pub fn half_place(value: u16) -> f32 {
    // 2^(max(exponent, 1) - 127 - 8), which is denormal for small exponents.
    let exponent = i32::from(value >> 7 & 0xff).max(1) - 8;
    f32::from_bits(if exponent > 0 { (exponent as u32) << 23 } else { 1 << (22 + exponent) })
}

/// Steps of a correction of 8 bits.
pub const STEPS_8: f32 = 127.0;
/// Steps of a correction of 16 bits.
pub const STEPS_16: f32 = 32767.0;

/// The nearest bf16, and what it lacks in steps of half a place.
#[inline(always)]
pub fn corrected(x: f32, steps: f32) -> (u16, i16) {
    let value = nearest(x);
    let share = ((x - widened(value)) / half_place(value)).clamp(-1.0, 1.0);
    (value, (share * steps).round() as i16)
}

/// The value of a bf16 and its correction.
#[inline(always)]
pub fn joined(value: u16, code: i16, steps: f32) -> f32 {
    widened(value) + f32::from(code) / steps * half_place(value)
}

/// The value after a change, as a bf16 and the compensation that it lacks.
#[inline(always)]
pub fn compensated(value: u16, compensation: u16, change: f32) -> (u16, u16) {
    let (before, lacking) = (widened(value), widened(compensation) + change);
    let after = nearest(before + lacking);
    (after, nearest(lacking - (widened(after) - before)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLES: [f32; 9] = [1.0, 1.003, -0.77, 3.2e-5, 1e-39, -2.5e-41, 2e30, 0.0, -1.996];

    #[test]
    fn as_many_draws_lead_away_from_zero_as_the_fraction_says() {
        for x in SAMPLES {
            let down = (x.to_bits() >> 16) as u16;
            let away = (0..=u16::MAX).filter(|draw| stochastic(x, *draw) != down).count();
            assert_eq!(away as u32, x.to_bits() & 0xffff, "{x}");
        }
        assert!((0..=u16::MAX).all(|draw| stochastic(widened(0x3f81), draw) == 0x3f81));
    }

    #[test]
    fn the_mean_of_a_million_draws_is_the_value() {
        use crate::narrow::draws::{Draws, Stream};
        let mut draws = vec![0; 1 << 20];
        Draws::new(5, Stream::Sixteen, 1, 9).sixteen(0, &mut draws);
        for x in [1.003f32, -0.7712, 1.0001] {
            let sum: f64 = draws.iter().map(|draw| f64::from(widened(stochastic(x, *draw)))).sum();
            let fraction = f64::from(x.to_bits() & 0xffff) / 65536.0;
            let place = 2.0 * f64::from(half_place((x.to_bits() >> 16) as u16));
            let error = place * (fraction * (1.0 - fraction) / draws.len() as f64).sqrt();
            let mean = sum / draws.len() as f64;
            assert!((mean - f64::from(x)).abs() < 3.0 * error, "{x}: {mean}");
        }
    }

    #[test]
    fn nothing_finite_becomes_infinite_and_nothing_else_is_hidden() {
        for x in [f32::MAX, f32::MIN, widened(0x7f7f)] {
            assert!([0, 1, 0x8000, u16::MAX].into_iter().all(|draw| widened(stochastic(x, draw)).is_finite()));
        }
        assert_eq!(widened(stochastic(f32::INFINITY, 5)), f32::INFINITY);
        let nan = f32::from_bits(0x7f80_0001);
        assert!(widened(stochastic(f32::NAN, 5)).is_nan() && widened(nearest(nan)).is_nan());
    }

    #[test]
    fn corrections_restore_values() {
        for x in SAMPLES {
            let value = nearest(x);
            for (steps, bound) in [(STEPS_8, 1.01 / 254.0), (STEPS_16, 1.01 / 65534.0)] {
                let (stored, code) = corrected(x, steps);
                assert_eq!(stored, value);
                // Denormal numbers are no finer than their own places.
                let near = half_place(value) * bound + x.abs() * f32::EPSILON + 1.5e-45;
                assert!((joined(stored, code, steps) - x).abs() <= near, "{x} {}", joined(stored, code, steps));
                assert_eq!(corrected(widened(value), steps), (value, 0));
            }
        }
        assert_eq!(half_place(nearest(1.0)), 2f32.powi(-8));
        assert_eq!(half_place(0), 2f32.powi(-134));
    }

    #[test]
    fn compensation_keeps_small_changes() {
        let (mut value, mut lacking) = (nearest(1.0), 0);
        for _ in 0..100 {
            let whole = widened(value) + widened(lacking);
            (value, lacking) = compensated(value, lacking, -1e-4 * whole);
            assert!(widened(lacking).abs() <= half_place(value) * 1.01);
        }
        let whole = widened(value) + widened(lacking);
        assert!((whole - 0.99).abs() < 3e-4, "{whole}");
        assert_eq!(compensated(value, lacking, 0.0), (value, lacking));
    }
}
