//! Low-rank optimizers and gradient rules for any Burn module.
//!
//! - [`AdamW`]: the measure of the others, in one pass over memory.
//! - [`DctAdamW`]: moments in a subspace of the discrete cosine transform.
//! - [`rules`]: passes over the gradients of a whole module, such as clipping by their global norm.
//! - [`StateMeter`]: the bytes that optimizer states really take.
//! - [`registry`]: the list of optimizers by name, with their options and the memory they take.

extern crate alloc;

mod adamw;
mod dct;
mod dct_adamw;
mod error;
mod error_feedback;
mod meter;
pub mod registry;
pub mod rules;

// The derive of `RecordState` names these as items of the crate it is used in.
pub(crate) use burn::optim::{RecordState, StateSink, StateSource, join_path};

pub use adamw::{AdamW, AdamWConfig, AdamWState};
pub use dct::{Basis, Dct};
pub use dct_adamw::{DctAdamW, DctAdamWConfig, DctAdamWState, Norm, ProjectedState, Side};
pub use error::OptimError;
pub use error_feedback::{ErrorBuffer, ErrorFeedback, QuantisedRow, quantise_row};
pub use meter::{Metered, StateMeter};
