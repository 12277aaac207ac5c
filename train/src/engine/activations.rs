//! What forward passes leave for the backward pass: measured, not computed.

use burn::tensor::Device;

use crate::process::BlockAllocator;

/// Bytes in use at a moment: of large blocks on the CPU, of the pool of a GPU; none where neither tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Live(Option<u64>);

impl Live {
    pub fn of(device: &Device) -> Self {
        Self(device.memory_pool_usage().map(|pool| pool.bytes_in_use).or_else(BlockAllocator::live))
    }

    /// Bytes that have come since.
    pub fn grown(self, device: &Device) -> Option<u64> {
        Some(Self::of(device).0?.saturating_sub(self.0?))
    }
}

/// The most that any forward pass of a step left.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Activations(Option<u64>);

impl Activations {
    pub fn note(&mut self, bytes: Option<u64>) {
        self.0 = self.0.max(bytes);
    }

    pub fn most(self) -> Option<u64> {
        self.0
    }
}
