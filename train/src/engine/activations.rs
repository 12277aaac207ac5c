//! Memory that forward passes keep for the backward pass: measured, not computed.

use burn::tensor::Device;

use crate::process::BlockAllocator;

/// Bytes in use at one time: of large blocks on the CPU, of the pool of a GPU; none if neither reports them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Live(Option<u64>);

impl Live {
    pub fn of(device: &Device) -> Self {
        Self(device.memory_pool_usage().map(|pool| pool.bytes_in_use).or_else(BlockAllocator::live))
    }

    /// Returns the increase in bytes since then.
    pub fn grown(self, device: &Device) -> Option<u64> {
        Some(Self::of(device).0?.saturating_sub(self.0?))
    }
}

/// Maximum memory kept by any forward pass of a step.
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
