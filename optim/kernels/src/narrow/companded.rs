//! Moments as companded 8-bit codes: "FlashOptim: Optimizers for Memory Efficient Training" (Gonzalez Ortiz et al., arXiv 2602.23349).
//!
//! Groups share a scale of f16. First moments are bent by `2 x / (1 + |x|)` to a signed code, second ones are stored as their roots.

use burn::tensor::f16;

/// Values that share a scale.
pub const GROUP: usize = 32;

/// Scales never fall below this, so that a group of zeros divides by no zero.
const LEAST: f32 = 1e-12;
/// The largest f16; above it a scale would be infinite and restore nothing.
const MOST: f32 = 65504.0;

/// Kind of a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Companding {
    /// First moment: codes are signed.
    Signed,
    /// Second moment: codes are those of roots.
    Root,
}

impl Companding {
    /// Encodes a group of at most [`GROUP`] values and returns its scale. Scales end at the largest f16; a group with NaN gets a scale of NaN.
    #[inline(always)]
    pub fn encode(self, values: &[f32], codes: &mut [u8]) -> f16 {
        let of = |value: f32| if self == Self::Signed { value } else { value.sqrt() };
        let mut largest = 0f32;
        let mut lost = false;
        for value in values {
            let value = of(*value).abs();
            lost |= value.is_nan();
            largest = largest.max(value);
        }
        let scale = largest.clamp(LEAST, MOST);
        for (code, value) in codes.iter_mut().zip(values) {
            let share = of(*value) / scale;
            *code = match self {
                Self::Signed => {
                    let share = share.clamp(-1.0, 1.0);
                    (STEPS * (2.0 * share / (1.0 + share.abs())) + 0.5).floor() as i8 as u8
                }
                Self::Root => (255.0 * share.min(1.0) + 0.5).floor() as u8,
            };
        }
        if lost { f16::NAN } else { f16::from_f32(scale) }
    }

    /// Values of one group.
    #[inline(always)]
    pub fn decode(self, codes: &[u8], scale: f16, values: &mut [f32]) {
        let scale = super::f16::widened(scale.to_bits());
        for (value, code) in values.iter_mut().zip(codes) {
            *value = match self {
                Self::Signed => {
                    let bent = f32::from(*code as i8) / STEPS;
                    bent / (2.0 - bent.abs()) * scale
                }
                Self::Root => {
                    let root = f32::from(*code) / 255.0 * scale;
                    root * root
                }
            };
        }
    }
}

/// Codes on each side of 0.
const STEPS: f32 = 127.0;

/// Codes and scales of all groups.
pub fn encoded(kind: Companding, values: &[f32]) -> (Vec<u8>, Vec<f16>) {
    let mut codes = vec![0; values.len()];
    let groups = values.chunks(GROUP).zip(codes.chunks_mut(GROUP));
    let scales = groups.map(|(values, codes)| kind.encode(values, codes)).collect();
    (codes, scales)
}

/// The values that codes represent.
pub fn decoded(kind: Companding, codes: &[u8], scales: &[f16]) -> Vec<f32> {
    let mut values = vec![0.0; codes.len()];
    for ((codes, values), scale) in codes.chunks(GROUP).zip(values.chunks_mut(GROUP)).zip(scales) {
        kind.decode(codes, *scale, values);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_near_and_codes_come_back() {
        let values: Vec<f32> =
            (0..100).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(i % 5 - 6)).chain([0.0; 32]).collect();
        for kind in [Companding::Signed, Companding::Root] {
            let values: Vec<f32> = values.iter().map(|x| if kind == Companding::Signed { *x } else { x * x }).collect();
            let (codes, scales) = encoded(kind, &values);
            let restored = decoded(kind, &codes, &scales);
            for (i, (ours, x)) in restored.iter().zip(&values).enumerate() {
                let scale = scales[i / GROUP].to_f32();
                let (ours, x, bound) = match kind {
                    Companding::Signed => (*ours, *x, 0.0079 * scale),
                    Companding::Root => (ours.sqrt(), x.sqrt(), 0.00197 * scale),
                };
                assert!((ours - x).abs() <= bound + x.abs() * 2f32.powi(-11), "{kind:?} {i}: {ours} {x}");
            }
            assert_eq!(encoded(kind, &restored), (codes, scales));
            assert!(restored[100..].iter().all(|x| *x == 0.0));
        }
    }

    #[test]
    fn scales_end_at_the_largest_f16_and_nan_is_not_hidden() {
        for (x, finite) in [(1e30f32, true), (f32::INFINITY, true), (f32::NAN, false)] {
            for kind in [Companding::Signed, Companding::Root] {
                let (codes, scales) = encoded(kind, &[x, 1.0]);
                assert_eq!(decoded(kind, &codes, &scales).iter().all(|x| x.is_finite()), finite, "{x}");
            }
        }
    }
}
