//! Low-rank optimizers and gradient rules for any Burn module.
//!
//! - [`rules`]: passes over the gradients of a whole module, such as clipping by their global norm.
//! - [`StateMeter`]: the bytes that optimizer states really take.
//! - [`registry`]: the list of optimizers by name, with their options and the memory they take.

mod error;
mod meter;
pub mod registry;
pub mod rules;

pub use error::OptimError;
pub use meter::{Metered, StateMeter};
