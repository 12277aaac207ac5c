//! Values as 8-bit codes of a non-linear map, scaled by the largest magnitude of each block: "8-bit Optimizers via Block-wise Quantization"
//! (Dettmers et al., arXiv 2110.02861).

use std::sync::LazyLock;

use crate::vectorised::vectorised;
use rayon::prelude::*;

/// The 256 values that codes represent, ascending.
pub struct DynamicMap {
    values: [f32; 256],
    /// Half way between a value and the next.
    middles: [f32; 256],
    /// Code of the smallest number whose upper 16 bits are the index: at most one middle lies within such a cell.
    cells: Vec<u8>,
    signed: bool,
}

/// Decades below 1 that the map covers.
const DECADES: i32 = 7;

impl DynamicMap {
    /// The map of first moments: both signs; code 127 is 0, code 255 is 1, there is no -1.
    pub fn signed() -> &'static Self {
        static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(true));
        &MAP
    }

    /// The map of second moments: from code 0, which is 0, to code 255, which is 1.
    pub fn unsigned() -> &'static Self {
        static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(false));
        &MAP
    }

    fn new(signed: bool) -> Self {
        let mut all = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let count = 1 << if signed { decade } else { decade + 1 };
            let edge = |i: i32| f64::from(0.1f32) + (1.0 - f64::from(0.1f32)) * f64::from(i) / f64::from(count);
            for i in 0..count {
                let value = ((edge(i) + edge(i + 1)) / 2.0 * 10f64.powi(decade + 1 - DECADES)) as f32;
                all.push(value);
                if signed {
                    all.push(-value);
                }
            }
        }
        all.sort_by(f32::total_cmp);
        let mut values = [0.0; 256];
        values.copy_from_slice(&all);
        let mut middles = [f32::INFINITY; 256];
        for code in 0..255 {
            middles[code] = ((f64::from(values[code]) + f64::from(values[code + 1])) / 2.0) as f32;
        }
        let cell = |bits: u32| {
            // The least number of a cell has the smallest magnitude of positive ones, the greatest of negative ones.
            let least = f32::from_bits(if bits < 0x8000 { bits << 16 } else { bits << 16 | 0xffff });
            middles.partition_point(|middle| *middle < least) as u8
        };
        Self { values, middles, cells: (0..1 << 16).map(cell).collect(), signed }
    }

    /// Value of each code.
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The code of the nearest value, of two equally near ones the lower.
    #[inline]
    pub fn nearest(&self, x: f32) -> u8 {
        let code = self.cells[(x.to_bits() >> 16) as usize];
        code + u8::from(self.middles[usize::from(code)] < x)
    }

    /// Encodes one block and returns its largest magnitude. The sign of a first moment survives, though a positive one may become 0; with
    /// `keep_positive` a positive second moment does not.
    pub fn encode(&self, values: &mut [f32], codes: &mut [u8], keep_positive: bool) -> f32 {
        let largest = vectorised(
            #[inline(always)]
            || {
                const LANES: usize = 16;
                let mut lanes = [0f32; LANES];
                let (chunks, rest) = values.as_chunks::<LANES>();
                for chunk in chunks {
                    for (lane, value) in lanes.iter_mut().zip(chunk) {
                        *lane = if value.abs() > *lane { value.abs() } else { *lane };
                    }
                }
                let largest = lanes.iter().chain(rest).fold(0f32, |largest, value| largest.max(value.abs()));
                // The square of a huge gradient is infinite, and infinity times code 0 is not a number.
                let largest = largest.min(f32::MAX);
                for value in values.iter_mut() {
                    // A quotient and not a product with 1 / largest, which is infinite for denormal numbers.
                    *value = value.clamp(-f32::MAX, f32::MAX) / largest;
                }
                largest
            },
        );
        if largest == 0.0 {
            codes.fill(self.nearest(0.0));
            return 0.0;
        }
        let zero = self.nearest(0.0);
        for (code, value) in codes.iter_mut().zip(values.iter()) {
            let nearest = self.nearest(*value);
            let lost = nearest == zero && *value != 0.0;
            *code = match self.signed {
                true => nearest - u8::from(lost && *value < 0.0),
                false => nearest + u8::from(lost && keep_positive),
            };
        }
        largest
    }

    /// Values of one block.
    #[inline]
    pub fn decode(&self, codes: &[u8], largest: f32, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.values[usize::from(*code)] * largest;
        }
    }
}

/// Codes and largest magnitudes of all blocks of `values`.
pub fn quantise(map: &DynamicMap, values: &[f32], block: usize, keep_positive: bool) -> (Vec<u8>, Vec<f32>) {
    let mut values = values.to_vec();
    let mut codes = vec![0; values.len()];
    let mut largest = vec![0.0; values.len().div_ceil(block)];
    values
        .par_chunks_mut(block)
        .zip(codes.par_chunks_mut(block))
        .zip(&mut largest)
        .for_each(|((values, codes), largest)| *largest = map.encode(values, codes, keep_positive));
    (codes, largest)
}

/// The values that codes represent.
pub fn dequantise(map: &DynamicMap, codes: &[u8], largest: &[f32], block: usize) -> Vec<f32> {
    let mut values = vec![0.0; codes.len()];
    codes
        .par_chunks(block)
        .zip(values.par_chunks_mut(block))
        .zip(largest)
        .for_each(|((codes, values), largest)| map.decode(codes, *largest, values));
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_have_their_known_values() {
        let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
        for map in [signed, unsigned] {
            assert!(map.values.windows(2).all(|pair| pair[0] < pair[1]));
        }
        let known = [
            (0, -0.992_968_74),
            (1, -0.978_906_3),
            (126, -5.5e-7),
            (127, 0.0),
            (128, 5.5e-7),
            (254, 0.992_968_74),
            (255, 1.0),
        ];
        for (code, value) in known {
            assert!((signed.values[code] - value).abs() <= 1e-7 * value.abs(), "{code}: {}", signed.values[code]);
        }
        for (code, value) in [(0, 0.0), (1, 3.25e-7), (2, 7.75e-7), (254, 0.996_484_4), (255, 1.0)] {
            assert!((unsigned.values[code] - value).abs() <= 1e-7 * value.abs(), "{code}: {}", unsigned.values[code]);
        }
    }

    #[test]
    fn the_table_finds_the_nearest_value() {
        for map in [DynamicMap::signed(), DynamicMap::unsigned()] {
            let slow = |x: f32| map.middles.partition_point(|middle| *middle < x) as u8;
            let mut tried: Vec<f32> = (0..200_000).map(|i| (i as f32 / 1e5 - 1.0) * 10f32.powi(-(i % 9))).collect();
            for middle in map.middles {
                tried.extend([middle, middle.next_up(), middle.next_down()]);
            }
            for x in tried.into_iter().filter(|x| x.abs() <= 1.0) {
                assert_eq!(map.nearest(x), slow(x), "{x:e}");
            }
        }
    }

    #[test]
    fn values_are_near_and_codes_come_back() {
        let values: Vec<f32> = (0..700).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(i % 5 - 2)).collect();
        for (map, bound) in [(DynamicMap::signed(), 0.00704), (DynamicMap::unsigned(), 0.00352)] {
            let values: Vec<f32> = values.iter().map(|x| if map.signed { *x } else { x.abs() }).collect();
            let (codes, largest) = quantise(map, &values, 256, false);
            let restored = dequantise(map, &codes, &largest, 256);
            for (i, (restored, value)) in restored.iter().zip(&values).enumerate() {
                assert!((restored - value).abs() <= bound * largest[i / 256]);
                assert!(restored * value >= 0.0 && (*value >= 0.0 || *restored < 0.0), "the sign survives");
            }
            if !map.signed {
                assert_eq!(quantise(map, &restored, 256, false), (codes, largest));
            }
        }
    }

    #[test]
    fn zero_blocks_denormal_numbers_and_kept_signs() {
        let map = DynamicMap::unsigned();
        assert_eq!(dequantise(map, &quantise(map, &[0.0; 5], 256, false).0, &[0.0], 256), [0.0; 5]);
        let (codes, _) = quantise(map, &[1.0, 1e-9, 0.0], 256, false);
        assert_eq!(codes, [255, 0, 0]);
        let (codes, _) = quantise(map, &[1.0, 1e-9, 0.0], 256, true);
        assert_eq!(codes, [255, 1, 0]);
        let (codes, largest) = quantise(map, &[1e-40, 5e-41], 256, false);
        assert!(codes[0] == 255 && codes[1] > 100 && largest[0] > 0.0);
    }
}
