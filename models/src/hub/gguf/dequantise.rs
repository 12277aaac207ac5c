//! Values of plain numbers and of blocks.

use lowrank_kernels::narrow::ggml::Blocks;
use lowrank_kernels::narrow::{bf16, f16};

use super::types::TensorType;

/// Values of whole blocks.
pub(super) fn dequantise(kind: TensorType, bytes: &[u8]) -> Vec<f32> {
    match kind {
        TensorType::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        TensorType::F16 => bytes.as_chunks().0.iter().map(|bytes| f16::widened(u16::from_le_bytes(*bytes))).collect(),
        TensorType::BF16 => bytes.as_chunks().0.iter().map(|bytes| bf16::widened(u16::from_le_bytes(*bytes))).collect(),
        TensorType::Blocks(kind) => Blocks { kind, bytes: bytes.to_vec() }.restored(),
    }
}
