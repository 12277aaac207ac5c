//! Kernels for low-rank training with Burn, without knowledge of any model or optimizer.
//!
//! - [`ops`]: the operations of models with their backward passes, fused on the CPU backend.
//! - [`dct`]: cosine transforms of rows.
//! - [`decompose`]: singular directions, orthonormal factors, triangles and inverses on the host.
//! - [`newton_schulz`]: matrices with singular values near 1.
//! - [`elementwise`] and [`vectorised`]: one pass over memory, with the vector instructions of the processor.
//! - [`instructions`]: the instruction set that all of them use.
//! - [`random`]: seeded draws that depend only on their purpose.
//! - [`narrow`]: values in fewer bytes than f32, and the random bits that round them.
//! - [`host`]: elements of tensors on the host.

pub mod dct;
pub mod decompose;
mod eigen;
pub mod elementwise;
pub mod host;
pub mod instructions;
pub mod narrow;
pub mod newton_schulz;
pub mod ops;
pub mod random;
pub mod vectorised;
