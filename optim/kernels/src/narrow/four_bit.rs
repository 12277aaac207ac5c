//! Values as 4-bit codes of a map for normal values with a scale for each block, and the scales in 8 bits: "QLoRA: Efficient Finetuning of
//! Quantized LLMs" (Dettmers et al., arXiv 2305.14314).

use rayon::prelude::*;

use super::blocks::DynamicMap;
use crate::vectorised::vectorised;

/// Values of the codes of NF4: quantiles of the normal distribution, scaled to 1.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Values of the codes of FP4, for reading.
pub const FP4: [f32; 16] = {
    const POSITIVE: [f32; 8] = [0.0, 1.0 / 192.0, 2.0 / 3.0, 1.0, 1.0 / 3.0, 0.5, 1.0 / 6.0, 0.25];
    let mut map = [0.0; 16];
    let mut code = 0;
    while code < 8 {
        map[code] = POSITIVE[code];
        map[code + 8] = -POSITIVE[code];
        code += 1;
    }
    map
};

/// Code of the value 0 in NF4.
const ZERO: u8 = 7;
/// Scales in a block of 8-bit scales.
pub const NESTED_BLOCK: usize = 256;

/// Scales of blocks: their largest magnitudes.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// In f32.
    Plain(Vec<f32>),
    /// As 8-bit codes of the difference to their mean.
    Double {
        /// Codes, one per block.
        codes: Vec<u8>,
        /// Largest magnitude of each block of codes.
        nested: Vec<f32>,
        /// Values of the codes.
        map: Box<[f32; 256]>,
        /// Mean of the scales.
        offset: f32,
    },
}

/// Values as 4-bit codes.
#[derive(Clone, Debug, PartialEq)]
pub struct FourBit {
    /// Two codes a byte, the first in the high half.
    pub packed: Vec<u8>,
    /// Values of the codes.
    pub map: [f32; 16],
    /// Values in a block.
    pub block: usize,
    /// Number of values.
    pub count: usize,
    /// Largest magnitude of each block.
    pub scales: Scales,
}

/// Limits between the codes: half way from a value to the next, in f32.
pub fn nf4_limits() -> [f32; 15] {
    std::array::from_fn(|code| (NF4[code] + NF4[code + 1]) / 2.0)
}

impl FourBit {
    /// NF4 codes of values, with scales in f32. A block of zeros has the code of 0.
    pub fn nf4(values: &[f32], block: usize) -> Self {
        // Whole bytes and whole blocks for each thread.
        let part = if block.is_multiple_of(2) { block * BLOCKS } else { values.len().max(1) };
        let mut packed = vec![0; values.len().div_ceil(2)];
        let mut scales = vec![0.0; values.len().div_ceil(block)];
        values
            .par_chunks(part)
            .zip(packed.par_chunks_mut(part.div_ceil(2)))
            .zip(scales.par_chunks_mut(part.div_ceil(block)))
            .for_each(|((values, packed), scales)| encode(values, block, packed, scales));
        Self { packed, map: NF4, block, count: values.len(), scales: Scales::Plain(scales) }
    }

    /// The same with scales in 8 bits.
    pub fn double(self) -> Self {
        let Scales::Plain(scales) = &self.scales else { return self };
        Self { scales: Scales::double(scales), ..self }
    }

    /// Restores the values from index `first` on.
    pub fn restore(&self, first: usize, to: &mut [f32]) {
        let Self { packed, map, block, scales, .. } = self;
        restore(packed, map, *block, &|block| scales.at(block), first, to);
    }

    /// All values.
    pub fn restored(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.count];
        self.restore(0, &mut values);
        values
    }

    /// Bytes of this number of values.
    pub fn bytes(count: usize, block: usize, double: bool) -> usize {
        let blocks = count.div_ceil(block);
        count.div_ceil(2) + if double { blocks + 4 * blocks.div_ceil(NESTED_BLOCK) + 4 } else { 4 * blocks }
    }
}

impl Scales {
    /// Scales as 8-bit codes: the nearest of the signed dynamic map to the difference to the mean, of two equally near ones the lower.
    pub fn double(scales: &[f32]) -> Self {
        let map = DynamicMap::signed();
        let offset = (scales.iter().map(|x| f64::from(*x)).sum::<f64>() / scales.len().max(1) as f64) as f32;
        let mut codes = Vec::with_capacity(scales.len());
        let mut nested = Vec::new();
        for scales in scales.chunks(NESTED_BLOCK) {
            let lost = scales.iter().any(|x| !x.is_finite());
            let largest = scales.iter().fold(0f32, |most, x| most.max((x - offset).abs()));
            let inverse = if largest > 0.0 { 1.0 / largest } else { 0.0 };
            codes.extend(scales.iter().map(|x| map.nearest((x - offset) * inverse)));
            nested.push(if lost { f32::NAN } else { largest });
        }
        Self::Double { codes, nested, map: Box::new(*map.values()), offset }
    }

    /// Scale of a block: of 8-bit scales a product and a sum, each rounded.
    #[inline]
    pub fn at(&self, block: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[block],
            Self::Double { codes, nested, map, offset } => {
                let scaled = map[usize::from(codes[block])] * nested[block / NESTED_BLOCK];
                scaled + offset
            }
        }
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Double { codes, .. } => codes.len(),
        }
    }

    /// Returns true if there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Blocks that a thread encodes at a time.
const BLOCKS: usize = 256;

/// Encodes blocks of values and gives the largest magnitude of each.
fn encode(values: &[f32], block: usize, packed: &mut [u8], scales: &mut [f32]) {
    const LANES: usize = 64;
    let limits = nf4_limits();
    let mut codes = vec![0; values.len()];
    vectorised(
        #[inline(always)]
        || {
            let blocks = values.chunks(block).zip(codes.chunks_mut(block)).zip(scales.iter_mut());
            for ((values, codes), scale) in blocks {
                let mut largest = 0f32;
                let mut finite = true;
                for x in values {
                    largest = if x.abs() > largest { x.abs() } else { largest };
                    finite &= x.is_finite();
                }
                let inverse = 1.0 / largest.max(1e-38);
                for (values, codes) in values.chunks(LANES).zip(codes.chunks_mut(LANES)) {
                    let mut shares = [0f32; LANES];
                    for (share, x) in shares.iter_mut().zip(values) {
                        *share = (x * inverse).clamp(-1.0, 1.0);
                    }
                    let mut counts = [0u32; LANES];
                    for limit in limits {
                        for (count, share) in counts.iter_mut().zip(&shares) {
                            *count += u32::from(limit < *share);
                        }
                    }
                    for (code, count) in codes.iter_mut().zip(&counts) {
                        *code = *count as u8;
                    }
                }
                // NaN is no maximum: it is kept as the scale of its block.
                *scale = if finite { largest } else { f32::NAN };
            }
        },
    );
    for (byte, pair) in packed.iter_mut().zip(codes.chunks(2)) {
        *byte = pair[0] << 4 | pair.get(1).copied().unwrap_or(ZERO);
    }
}

/// Restores values from index `first` on, `map[code] * scale`.
#[inline(always)]
pub(super) fn restore(
    packed: &[u8],
    map: &[f32; 16],
    block: usize,
    scale: &dyn Fn(usize) -> f32,
    first: usize,
    to: &mut [f32],
) {
    let mut at = first;
    let end = first + to.len();
    while at < end {
        let number = at / block;
        let until = ((number + 1) * block).min(end);
        let scaled: [f32; 16] = {
            let scale = scale(number);
            std::array::from_fn(|code| map[code] * scale)
        };
        let to = &mut to[at - first..until - first];
        let code = |at: usize| usize::from(packed[at / 2] >> (4 * (1 - at % 2)) & 15);
        let head = at % 2;
        if head == 1 {
            to[0] = scaled[code(at)];
        }
        let (pairs, rest) = to[head..].as_chunks_mut::<2>();
        let bytes = &packed[(at + head) / 2..];
        for (pair, byte) in pairs.iter_mut().zip(bytes) {
            *pair = [scaled[usize::from(byte >> 4)], scaled[usize::from(byte & 15)]];
        }
        if let [last] = rest {
            *last = scaled[code(until - 1)];
        }
        at = until;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.731).sin() * 10f32.powi((i / 40 % 4) as i32 - 2)).collect()
    }

    #[test]
    fn codes_are_the_nearest_whatever_the_number_of_threads() {
        let nearest = |share: f32| nf4_limits().iter().filter(|limit| **limit < share).count() as u8;
        // More than one part, an odd end, an odd block, and what is not finite.
        for (count, block) in [(64 * BLOCKS * 2 + 77, 64), (1001, 7), (3, 64)] {
            let mut values = wave(count);
            values[count - 1] = f32::NAN;
            let coded = FourBit::nf4(&values, block);
            for (place, x) in values.iter().enumerate() {
                let of = &values[place / block * block..count.min((place / block + 1) * block)];
                let largest = of.iter().fold(0f32, |most, x| most.max(x.abs()));
                let code = coded.packed[place / 2] >> (4 * (1 - place % 2)) & 15;
                assert_eq!(code, nearest((x * (1.0 / largest.max(1e-38))).clamp(-1.0, 1.0)), "{place} of {count}");
                let scale = coded.scales.at(place / block);
                assert!(scale == largest || scale.is_nan() && place / block == (count - 1) / block);
            }
        }
    }

    #[test]
    fn values_are_near_and_any_part_can_be_restored() {
        for (count, block) in [(1, 64), (2, 32), (91, 64), (300, 32), (5000, 4096)] {
            let values = wave(count);
            let plain = FourBit::nf4(&values, block);
            let all = plain.restored();
            for (i, (ours, x)) in all.iter().zip(&values).enumerate() {
                let largest = plain.scales.at(i / block);
                assert!((ours - x).abs() <= 0.1521 * largest && (x.abs() < largest || ours == x));
            }
            assert_eq!(FourBit::nf4(&all, block), plain);
            for stored in [plain.clone(), plain.double()] {
                let all = stored.restored();
                for first in [0, 1, 7, 33].into_iter().filter(|first| *first < count) {
                    for length in [1, 2, 31, 64, 65, count].into_iter().filter(|length| first + length <= count) {
                        let mut part = vec![0.0; length];
                        stored.restore(first, &mut part);
                        assert_eq!(part, all[first..first + length]);
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_powers_of_two_and_what_is_not_finite() {
        let zeros = FourBit::nf4(&[0.0; 70], 64);
        assert!(zeros.packed.iter().all(|byte| *byte == 0x77) && zeros.restored().iter().all(|x| *x == 0.0));
        let double = zeros.double();
        assert!(double.restored().iter().all(|x| *x == 0.0));
        let (values, scaled) = (wave(64), wave(64).iter().map(|x| x * 8.0).collect::<Vec<f32>>());
        let (plain, larger) = (FourBit::nf4(&values, 64), FourBit::nf4(&scaled, 64));
        assert_eq!(plain.packed, larger.packed);
        assert_eq!(plain.scales.at(0) * 8.0, larger.scales.at(0));
        for bad in [f32::NAN, f32::INFINITY] {
            let stored = FourBit::nf4(&[&[bad][..], &wave(99)].concat(), 64);
            let restored = stored.restored();
            assert!(restored[..64].iter().any(|x| x.is_nan()) && restored[64..].iter().all(|x| x.is_finite()));
        }
    }
}
