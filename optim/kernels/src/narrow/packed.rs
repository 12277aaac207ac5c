//! Matrices in codes, and tensors that hold them.

#[cfg(feature = "flex")]
pub use super::carrier::{carrier, holds_codes, memory, of_memory, packed, stored_bytes};
pub use super::matrix::{Codes, PackedMatrix};

/// A tensor that holds codes: on the CPU backend alone.
#[cfg(not(feature = "flex"))]
pub fn carrier(_matrix: &PackedMatrix, _device: &burn::tensor::Device) -> burn::tensor::Tensor<2> {
    unreachable!("matrices in codes are made for the CPU backend alone")
}

/// A tensor that holds the codes in such memory: on the CPU backend alone.
#[cfg(not(feature = "flex"))]
pub fn of_memory(
    _memory: burn::tensor::TensorData,
    _shape: [usize; 2],
    _device: &burn::tensor::Device,
) -> burn::tensor::Tensor<2> {
    unreachable!("matrices in codes are made for the CPU backend alone")
}

/// The codes that a tensor holds: without the CPU backend none.
#[cfg(not(feature = "flex"))]
pub fn packed(_x: &burn::tensor::Tensor<2>) -> Option<PackedMatrix> {
    None
}

/// Returns true if a tensor holds codes: without the CPU backend never.
#[cfg(not(feature = "flex"))]
pub fn holds_codes<const D: usize>(_x: &burn::tensor::Tensor<D>) -> bool {
    false
}

/// The stored values or codes of a tensor.
#[cfg(not(feature = "flex"))]
pub fn memory<const D: usize>(x: burn::tensor::Tensor<D>) -> burn::tensor::TensorData {
    x.into_data()
}

/// Bytes of the stored values or codes of a tensor.
#[cfg(not(feature = "flex"))]
pub fn stored_bytes<const D: usize>(x: &burn::tensor::Tensor<D>) -> usize {
    x.shape().num_elements() * x.dtype().size()
}
