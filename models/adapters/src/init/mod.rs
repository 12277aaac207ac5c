//! Initialisations of adapters, one file each.

pub(crate) mod factors;
pub(crate) mod olora;
pub(crate) mod origin;
pub(crate) mod orthogonal;
pub(crate) mod pissa;
mod start;

pub use factors::{asks_for_gradients, leaves_the_base, with_first_rate};
