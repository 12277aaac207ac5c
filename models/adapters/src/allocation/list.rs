//! List of allocations, one line each.

use lowrank_optim::registry::{Kind, Options, find};

use super::definition::{Allocation, AllocationEntry};
use super::{adalora, bayesian, diffora, dylora, increlora, snella, sora};
use crate::ground::error::AdapterError;

/// All allocations of this crate.
pub static ALLOCATIONS: &[&AllocationEntry] = &[
    &sora::ENTRY,
    &dylora::ENTRY,
    &adalora::ENTRY,
    &increlora::ENTRY,
    &diffora::ENTRY,
    &bayesian::ENTRY,
    &snella::ENTRY,
];

impl AllocationEntry {
    /// Returns the allocation with this name.
    pub fn find(name: &str) -> Result<&'static Self, AdapterError> {
        Ok(find(Kind::Allocation, ALLOCATIONS.iter().copied(), name)?)
    }
}

impl dyn Allocation {
    /// Returns the allocation with this name and the given options on top of its defaults.
    pub fn named(name: &str, options: &Options) -> Result<Box<Self>, AdapterError> {
        (AllocationEntry::find(name)?.read)(options)
    }
}
