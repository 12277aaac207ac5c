//! Initialisations of adapters, one file each.

pub(crate) mod factors;
mod gaussian;
mod olora;
pub(crate) mod origin;
mod orthogonal;
mod pissa;
mod random;
mod start;
