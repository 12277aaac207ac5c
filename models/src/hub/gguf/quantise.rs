//! Blocks of values, with the bytes of ggml's reference: scales are computed and used in f32, and stored as halves.

use burn::tensor::{bf16, f16};

use lowrank_kernels::narrow::ggml::{BlockType, encode_q8_0};

use super::types::TensorType;
use crate::error::ModelError;

/// The bytes of whole rows. Rejected: types that cannot be written, and values without an image in the type.
pub fn quantised(kind: TensorType, values: &[f32]) -> Result<Vec<u8>, ModelError> {
    let mut bytes = Vec::new();
    quantise(kind, values, &mut bytes).map_err(|reason| ModelError::Config(format!("a tensor {reason}")))?;
    Ok(bytes)
}

/// Appends the blocks of whole rows. Rejected: types that cannot be written, and values without an image in the type.
pub(super) fn quantise(kind: TensorType, values: &[f32], out: &mut Vec<u8>) -> Result<(), String> {
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(format!("has the value {value}: the weights are damaged"));
    }
    match kind {
        TensorType::F32 => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        TensorType::F16 => {
            for value in values {
                let half = f16::from_f32(*value);
                if half.is_infinite() {
                    return Err(format!("has the value {value}, which f16 cannot hold; take bf16 or f32"));
                }
                out.extend(half.to_le_bytes());
            }
        }
        TensorType::BF16 => out.extend(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes())),
        TensorType::Blocks(BlockType::Q4_0) => blocks(values, |block| q4_0(block, out))?,
        TensorType::Blocks(BlockType::Q4_1) => blocks(values, |block| q4_1(block, out))?,
        TensorType::Blocks(BlockType::Q5_0) => blocks(values, |block| q5_0(block, out))?,
        TensorType::Blocks(BlockType::Q5_1) => blocks(values, |block| q5_1(block, out))?,
        TensorType::Blocks(BlockType::Q8_0) => blocks(values, |block| q8_0(block, out))?,
        other => {
            return Err(format!(
                "cannot be written as {}: there is no single right way; let llama.cpp quantise an F32 file",
                other.name()
            ));
        }
    }
    Ok(())
}

fn blocks(values: &[f32], mut each: impl FnMut(&[f32; 32]) -> Result<(), String>) -> Result<(), String> {
    values.as_chunks::<32>().0.iter().try_for_each(&mut each)
}

/// Appends a scale or minimum as a half.
fn push_half(value: f32, out: &mut Vec<u8>) -> Result<(), String> {
    let half = f16::from_f32(value);
    if half.is_infinite() {
        return Err(format!("needs the scale {value}, which f16 cannot hold; take bf16 or f32"));
    }
    out.extend(half.to_le_bytes());
    Ok(())
}

/// The reciprocal of a scale; 0 for 0, which makes zeros.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The first value of greatest magnitude, with its sign.
fn greatest(block: &[f32; 32]) -> f32 {
    block.iter().fold(0.0, |greatest: f32, value| if value.abs() > greatest.abs() { *value } else { greatest })
}

fn range(block: &[f32; 32]) -> [f32; 2] {
    let min = block.iter().fold(f32::MAX, |min, value| min.min(*value));
    [min, block.iter().fold(f32::MIN, |max, value| max.max(*value))]
}

/// Low nibbles of values 0 to 15 with those of 16 to 31 as high ones.
fn push_nibbles(q: &[u8; 32], out: &mut Vec<u8>) {
    out.extend((0..16).map(|i| q[i] & 15 | (q[i + 16] & 15) << 4));
}

fn push_fifth_bits(q: &[u8; 32], out: &mut Vec<u8>) {
    let bits = q.iter().enumerate().fold(0u32, |bits, (i, q)| bits | u32::from(q >> 4 & 1) << i);
    out.extend(bits.to_le_bytes());
}

fn q8_0(values: &[f32; 32], out: &mut Vec<u8>) -> Result<(), String> {
    let mut block = [0; 34];
    encode_q8_0(values, &mut block);
    if f16::from_le_bytes([block[0], block[1]]).is_nan() {
        return push_half(greatest(values).abs() / 127.0, out);
    }
    out.extend(block);
    Ok(())
}

fn q4_0(block: &[f32; 32], out: &mut Vec<u8>) -> Result<(), String> {
    let d = greatest(block) / -8.0;
    let by = inverse(d);
    push_half(d, out)?;
    push_nibbles(&block.map(|value| ((value * by + 8.5) as u8).min(15)), out);
    Ok(())
}

fn q4_1(block: &[f32; 32], out: &mut Vec<u8>) -> Result<(), String> {
    let [min, max] = range(block);
    let d = (max - min) / 15.0;
    let by = inverse(d);
    push_half(d, out)?;
    push_half(min, out)?;
    push_nibbles(&block.map(|value| (((value - min) * by + 0.5) as u8).min(15)), out);
    Ok(())
}

fn q5_0(block: &[f32; 32], out: &mut Vec<u8>) -> Result<(), String> {
    let d = greatest(block) / -16.0;
    let by = inverse(d);
    let q = block.map(|value| ((value * by + 16.5) as u8).min(31));
    push_half(d, out)?;
    push_fifth_bits(&q, out);
    push_nibbles(&q, out);
    Ok(())
}

fn q5_1(block: &[f32; 32], out: &mut Vec<u8>) -> Result<(), String> {
    let [min, max] = range(block);
    let d = (max - min) / 31.0;
    let by = inverse(d);
    let q = block.map(|value| (((value - min) * by + 0.5) as u8).min(31));
    push_half(d, out)?;
    push_half(min, out)?;
    push_fifth_bits(&q, out);
    push_nibbles(&q, out);
    Ok(())
}
