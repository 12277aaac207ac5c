//! Low-rank optimizers and gradient rules for any Burn module.
//!
//! - [`AdamW`]: the measure of the others, in one pass over memory.
//! - [`rules`]: passes over the gradients of a whole module, such as clipping by their global norm.
//! - [`StateMeter`]: the bytes that optimizer states really take.
//! - [`registry`]: the list of optimizers by name, with their options and the memory they take.

extern crate alloc;

mod adamw;
mod error;
mod meter;
pub mod registry;
pub mod rules;

// The derive of `RecordState` names these as items of the crate it is used in.
pub(crate) use burn::optim::{RecordState, StateSink, StateSource};

pub use adamw::{AdamW, AdamWConfig, AdamWState};
pub use error::OptimError;
pub use meter::{Metered, StateMeter};
