//! Switch between the fused and the composed form of the operations.

use std::sync::atomic::{AtomicBool, Ordering};

pub(super) static FUSED: AtomicBool = AtomicBool::new(true);

/// Sets whether the operations use their fused form on the CPU backend, the default. Off, all are composed of Burn's own operations, with
/// equal numbers: to compare the two, or to look for an error. Applies to the whole process.
pub fn set_fused(on: bool) {
    FUSED.store(on, Ordering::Relaxed);
}
