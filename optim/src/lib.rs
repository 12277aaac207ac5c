//! Low-rank optimizers and gradient rules for any Burn module.
//!
//! - [`rules`]: passes over the gradients of a whole module, such as clipping by their global norm.
//! - [`registry`]: the list of optimizers by name, with their options and the memory they take.

mod error;
pub mod registry;
pub mod rules;

pub use error::OptimError;
