//! Values in fewer bytes than f32: 16-bit floats and what they cut off, 8-bit integers in groups, 4-bit codes, the blocks of
//! llama.cpp, 8-bit moments.

pub mod bf16;
pub mod blocks;
#[cfg(feature = "flex")]
mod carrier;
pub mod companded;
pub mod draws;
pub mod f16;
pub mod four_bit;
pub mod ggml;
pub mod groups;
mod matrix;
pub mod packed;

#[cfg(feature = "flex")]
pub(crate) use carrier::{View, view};
