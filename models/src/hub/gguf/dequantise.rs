//! Values of the blocks, bit by bit as ggml computes them: products in f32, scales first.

use burn::tensor::{bf16, f16};

use super::types::TensorType;

/// Appends the values of whole blocks.
pub(super) fn dequantise(kind: TensorType, bytes: &[u8], out: &mut Vec<f32>) {
    match kind {
        TensorType::F32 => out.extend(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))),
        TensorType::F16 => out.extend(bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32())),
        TensorType::BF16 => out.extend(bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32())),
        TensorType::Q4_0 => blocks(bytes, out, q4_0),
        TensorType::Q4_1 => blocks(bytes, out, q4_1),
        TensorType::Q5_0 => blocks(bytes, out, q5_0),
        TensorType::Q5_1 => blocks(bytes, out, q5_1),
        TensorType::Q8_0 => blocks(bytes, out, q8_0),
        TensorType::Q2K => blocks(bytes, out, q2_k),
        TensorType::Q3K => blocks(bytes, out, q3_k),
        TensorType::Q4K => blocks(bytes, out, q4_k),
        TensorType::Q5K => blocks(bytes, out, q5_k),
        TensorType::Q6K => blocks(bytes, out, q6_k),
        TensorType::Iq4Nl => blocks(bytes, out, iq4_nl),
        TensorType::Iq4Xs => blocks(bytes, out, iq4_xs),
    }
}

/// Applies `one` to every block of `B` bytes, which gives `V` values.
fn blocks<const B: usize, const V: usize>(bytes: &[u8], out: &mut Vec<f32>, one: fn(&[u8; B], &mut [f32; V])) {
    let mut values = [0.0; V];
    for block in bytes.as_chunks::<B>().0 {
        one(block, &mut values);
        out.extend_from_slice(&values);
    }
}

/// The half at an offset of a block.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Nibbles of 16 bytes: the low ones are values 0 to 15, the high ones 16 to 31.
fn nibbles(bytes: &[u8], mut each: impl FnMut(usize, u8)) {
    for (i, byte) in bytes.iter().enumerate() {
        each(i, byte & 15);
        each(i + 16, byte >> 4);
    }
}

fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], |i, q| out[i] = d * f32::from(q as i8 - 8));
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..], |i, q| out[i] = d * f32::from(q) + m);
}

/// The fifth bit of value `i`, in its place.
fn fifth(bits: u32, i: usize) -> u8 {
    ((bits >> i & 1) << 4) as u8
}

fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (d, bits) = (half_at(block, 0), u32::from_le_bytes([block[2], block[3], block[4], block[5]]));
    nibbles(&block[6..], |i, q| out[i] = d * f32::from((q | fifth(bits, i)) as i8 - 16));
}

fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let bits = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(&block[8..], |i, q| out[i] = d * f32::from(q | fifth(bits, i)) + m);
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (value, q) in out.iter_mut().zip(&block[2..]) {
        *value = d * f32::from(*q as i8);
    }
}

/// Bytes: 16 scales with their minima, 64 of two bits, d, dmin.
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
fn nibble(bytes: &[u8], group: usize, i: usize) -> u8 {
    bytes[32 * (group / 2) + i] >> (4 * (group % 2)) & 15
}

/// Bytes: d, dmin, 12 of scales, 128 of nibbles.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    grouped(d, min, &block[4..16], out, |group, i| nibble(&block[16..], group, i));
}

/// Bytes: d, dmin, 12 of scales, 32 of fifth bits, 128 of nibbles.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    grouped(d, min, &block[4..16], out, |group, i| nibble(&block[48..], group, i) | (block[16 + i] >> group & 1) << 4);
}

/// Bytes: 128 of low nibbles, 64 of high bits, 16 scales, d.
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

fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], |i, q| out[i] = d * f32::from(NON_LINEAR[usize::from(q)]));
}

/// Bytes: d, 2 of the scales' high bits, 4 of their low nibbles, 128 of nibbles.
fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let (d, high) = (half_at(block, 0), u16::from_le_bytes([block[2], block[3]]));
    for (group, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        let scale = d * f32::from((low | ((high >> (2 * group) & 3) as u8) << 4) as i8 - 32);
        nibbles(&block[8 + 16 * group..][..16], |i, q| values[i] = scale * f32::from(NON_LINEAR[usize::from(q)]));
    }
}
