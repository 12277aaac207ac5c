//! Weights in the blocks of ggml, the library of llama.cpp: integers of a few bits with scales for 32 or 256 values. They are restored bit by
//! bit as ggml computes them: products in f32, scales first.

use burn::tensor::f16;

use crate::vectorised::vectorised;

/// Kind of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the format
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
}

impl BlockType {
    /// All kinds.
    pub const ALL: [Self; 12] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
    ];

    /// Number of values in a block.
    pub const fn values(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Iq4Nl => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => 256,
        }
    }

    /// Number of bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Iq4Xs => 136,
        }
    }

    /// Restores the values of consecutive blocks from index `first` on.
    #[inline(always)]
    pub fn restore(self, blocks: &[u8], first: usize, to: &mut [f32]) {
        // A function that is passed by itself is called through one that is compiled for the oldest processors.
        macro_rules! each {
            ($one:ident) => {
                restore(
                    blocks,
                    first,
                    to,
                    #[inline(always)]
                    |block, values| $one(block, values),
                )
            };
        }
        match self {
            Self::Q4_0 => each!(q4_0),
            Self::Q4_1 => each!(q4_1),
            Self::Q5_0 => each!(q5_0),
            Self::Q5_1 => each!(q5_1),
            Self::Q8_0 => each!(q8_0),
            Self::Q2K => each!(q2_k),
            Self::Q3K => each!(q3_k),
            Self::Q4K => each!(q4_k),
            Self::Q5K => each!(q5_k),
            Self::Q6K => each!(q6_k),
            Self::Iq4Nl => each!(iq4_nl),
            Self::Iq4Xs => each!(iq4_xs),
        }
    }
}

/// Values in blocks, one after another.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// Kind of all blocks.
    pub kind: BlockType,
    /// The blocks.
    pub bytes: Vec<u8>,
}

impl Blocks {
    /// Encodes values, whole blocks of them, as 8-bit integers with a scale in f16 for each 32 (`Q8_0`), bit by bit as ggml does. A block with
    /// a value that is not finite, or too large for its scale, has NaN for a scale.
    pub fn q8_0(values: &[f32]) -> Self {
        let kind = BlockType::Q8_0;
        let mut bytes = vec![0; values.len() / kind.values() * kind.bytes()];
        vectorised(
            #[inline(always)]
            || {
                let (values, bytes) = (values.as_chunks::<32>().0, bytes.as_chunks_mut::<34>().0);
                for (values, block) in values.iter().zip(bytes) {
                    encode_q8_0(values, block);
                }
            },
        );
        Self { kind, bytes }
    }

    /// All values.
    pub fn restored(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.bytes.len() / self.kind.bytes() * self.kind.values()];
        vectorised(
            #[inline(always)]
            || self.kind.restore(&self.bytes, 0, &mut values),
        );
        values
    }
}

/// Encodes one block of `Q8_0`.
#[inline(always)]
pub fn encode_q8_0(values: &[f32; 32], block: &mut [u8; 34]) {
    let mut largest = 0f32;
    let mut finite = true;
    for x in values {
        largest = if x.abs() > largest { x.abs() } else { largest };
        finite &= x.is_finite();
    }
    let d = largest / 127.0;
    let by = if d == 0.0 { 0.0 } else { 1.0 / d };
    let half = f16::from_f32(d);
    let half = if finite && half.is_finite() { half } else { f16::NAN };
    block[..2].copy_from_slice(&half.to_le_bytes());
    for (code, x) in block[2..].iter_mut().zip(values) {
        *code = (x * by).round() as i8 as u8;
    }
}

/// Applies `one` to every block of `B` bytes, which gives `V` values, and keeps those that are asked for.
#[inline(always)]
fn restore<const B: usize, const V: usize>(
    bytes: &[u8],
    first: usize,
    to: &mut [f32],
    one: impl Fn(&[u8; B], &mut [f32; V]),
) {
    let blocks = bytes.as_chunks::<B>().0;
    let (mut at, mut to) = (first, to);
    while !to.is_empty() {
        let (block, within) = (&blocks[at / V], at % V);
        // Of their own, so that no value that is written can be one that is read: only so the loops become vectors.
        let mut values = [0.0; V];
        one(block, &mut values);
        match to.first_chunk_mut::<V>() {
            Some(whole) if within == 0 => *whole = values,
            _ => {
                let count = to.len().min(V - within);
                to[..count].copy_from_slice(&values[within..within + count]);
            }
        }
        let taken = to.len().min(V - within);
        (at, to) = (at + taken, &mut to[taken..]);
    }
}

/// The half at an offset of a block.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    super::f16::widened(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Nibbles of 16 bytes: the low ones are values 0 to 15, the high ones 16 to 31.
#[inline(always)]
fn nibbles(bytes: &[u8], mut each: impl FnMut(usize, u8)) {
    for (i, byte) in bytes.iter().enumerate() {
        each(i, byte & 15);
        each(i + 16, byte >> 4);
    }
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], |i, q| out[i] = d * f32::from(q as i8 - 8));
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..], |i, q| out[i] = d * f32::from(q) + m);
}

/// The fifth bit of value `i`, in its place.
#[inline(always)]
fn fifth(bits: u32, i: usize) -> u8 {
    ((bits >> i & 1) << 4) as u8
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, bits) = (half_at(block, 0), u32::from_le_bytes([block[2], block[3], block[4], block[5]]));
    nibbles(&block[6..], |i, q| out[i] = d * f32::from((q | fifth(bits, i)) as i8 - 16));
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let bits = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(&block[8..], |i, q| out[i] = d * f32::from(q | fifth(bits, i)) + m);
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (value, q) in out.iter_mut().zip(&block[2..]) {
        *value = d * f32::from(*q as i8);
    }
}

/// Bytes: 16 scales with their minima, 64 of two bits, d, dmin.
#[inline(always)]
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, min) = (half_at(block, 80), half_at(block, 82));
    for (group, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = block[group];
        let (dl, ml) = (d * f32::from(scale & 15), min * f32::from(scale >> 4));
        let (part, shift, side) = (group / 8, group % 8 / 2 * 2, group % 2);
        for (i, value) in values.iter_mut().enumerate() {
            *value = dl * f32::from(block[16 + 32 * part + 16 * side + i] >> shift & 3) - ml;
        }
    }
}

/// Bytes: 32 of high bits, 64 of two bits, 12 of scales of 6 bits, d.
#[inline(always)]
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = half_at(block, 108);
    let scales = &block[96..108];
    for (group, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
        let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        let dl = d * f32::from((low | high << 4) as i8 - 32);
        let (part, shift, side) = (group / 8, group % 8 / 2 * 2, group % 2);
        for (i, value) in values.iter_mut().enumerate() {
            let q = (block[32 + 32 * part + 16 * side + i] >> shift & 3) as i8;
            let set = block[16 * side + i] >> (4 * part + shift / 2) & 1 == 1;
            *value = dl * f32::from(if set { q } else { q - 4 });
        }
    }
}

/// Scale and minimum of 6 bits of one of the 8 groups.
#[inline(always)]
fn scale_min(scales: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = match group {
        0..4 => (scales[group] & 63, scales[group + 4] & 63),
        _ => {
            (scales[group + 4] & 15 | (scales[group - 4] >> 6) << 4, scales[group + 4] >> 4 | (scales[group] >> 6) << 4)
        }
    };
    (f32::from(scale), f32::from(min))
}

/// Values of 8 groups of 32; `q` returns the integer of value `i` of a group.
#[inline(always)]
fn grouped(d: f32, min: f32, scales: &[u8], out: &mut [f32; 256], q: impl Fn(usize, usize) -> u8) {
    for (group, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = scale_min(scales, group);
        let (dl, ml) = (d * scale, min * minimum);
        for (i, value) in values.iter_mut().enumerate() {
            *value = dl * f32::from(q(group, i)) - ml;
        }
    }
}

/// The nibble of value `i` of a group.
#[inline(always)]
fn nibble(bytes: &[u8], group: usize, i: usize) -> u8 {
    bytes[32 * (group / 2) + i] >> (4 * (group % 2)) & 15
}

/// Bytes: d, dmin, 12 of scales, 128 of nibbles.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    grouped(d, min, &block[4..16], out, |group, i| nibble(&block[16..], group, i));
}

/// Bytes: d, dmin, 12 of scales, 32 of fifth bits, 128 of nibbles.
#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    grouped(d, min, &block[4..16], out, |group, i| nibble(&block[48..], group, i) | (block[16 + i] >> group & 1) << 4);
}

/// Bytes: 128 of low nibbles, 64 of high bits, 16 scales, d.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (group, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(block[192 + group] as i8);
        let (part, quarter) = (group / 8, group % 8 / 2);
        for (k, value) in values.iter_mut().enumerate() {
            let i = 16 * (group % 2) + k;
            let low = block[64 * part + 32 * (quarter % 2) + i] >> (4 * (quarter / 2)) & 15;
            let high = block[128 + 32 * part + i] >> (2 * quarter) & 3;
            *value = scale * f32::from((low | high << 4) as i8 - 32);
        }
    }
}

/// The 16 values of the non-linear types.
const NON_LINEAR: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

#[inline(always)]
fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], |i, q| out[i] = d * f32::from(NON_LINEAR[usize::from(q)]));
}

/// Bytes: d, 2 of the scales' high bits, 4 of their low nibbles, 128 of nibbles.
#[inline(always)]
fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let (d, high) = (half_at(block, 0), u16::from_le_bytes([block[2], block[3]]));
    for (group, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        let scale = d * f32::from((low | ((high >> (2 * group) & 3) as u8) << 4) as i8 - 32);
        nibbles(&block[8 + 16 * group..][..16], |i, q| values[i] = scale * f32::from(NON_LINEAR[usize::from(q)]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of some blocks, with scales that are ordinary numbers.
    fn some(kind: BlockType, blocks: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut draw = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) as u8
        };
        let mut bytes: Vec<u8> = (0..blocks * kind.bytes()).map(|_| draw()).collect();
        let scales: &[usize] = match kind {
            BlockType::Q2K => &[80, 82],
            BlockType::Q3K => &[108],
            BlockType::Q6K => &[208],
            BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
            _ => &[0],
        };
        for block in bytes.chunks_mut(kind.bytes()) {
            for at in scales {
                block[*at..at + 2].copy_from_slice(&f16::from_f32(0.01 + 0.001 * *at as f32).to_le_bytes());
            }
        }
        bytes
    }

    #[test]
    fn any_part_can_be_restored() {
        for kind in BlockType::ALL {
            let blocks = Blocks { kind, bytes: some(kind, 3) };
            let all = blocks.restored();
            assert_eq!(all.len(), 3 * kind.values());
            assert!(all.iter().all(|x| x.is_finite()) && all.iter().any(|x| *x != 0.0), "{kind:?}");
            for first in [0, 1, 31, 32, 33, kind.values(), kind.values() + 5] {
                for length in [1, 2, 31, 32, 65, kind.values(), all.len()] {
                    let length = length.min(all.len() - first.min(all.len()));
                    let mut part = vec![0.0; length];
                    kind.restore(&blocks.bytes, first, &mut part);
                    assert_eq!(part, all[first..first + length], "{kind:?} {first} {length}");
                }
            }
        }
    }

    #[test]
    fn eight_bits_are_near_and_what_is_not_finite_is_not_hidden() {
        let values: Vec<f32> = (0..96).map(|i| (i as f32 * 0.7).sin() * (1.0 + i as f32)).collect();
        let restored = Blocks::q8_0(&values).restored();
        for (block, restored) in values.chunks(32).zip(restored.chunks(32)) {
            let largest = block.iter().fold(0f32, |most, x| most.max(x.abs()));
            for (x, restored) in block.iter().zip(restored) {
                // Half a step, and the scale's own rounding to f16.
                assert!((x - restored).abs() <= largest * (0.5 / 127.0 + 1.0 / 2048.0), "{x} {restored}");
            }
        }
        assert!(Blocks::q8_0(&[0.0; 32]).restored().iter().all(|x| *x == 0.0));
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            let restored = Blocks::q8_0(&[&[bad][..], &[1.0; 63]].concat()).restored();
            assert!(restored[..32].iter().all(|x| x.is_nan()) && restored[32..].iter().all(|x| x.is_finite()), "{bad}");
        }
    }
}
