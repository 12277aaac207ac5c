//! Initialisations of adapters, one file each.

pub(crate) mod all_random;
pub(crate) mod factors;
pub(crate) mod gaussian;
mod olora;
pub(crate) mod origin;
mod orthogonal;
mod pissa;
mod random;
mod start;
