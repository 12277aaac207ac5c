//! Penalties on trained matrices of any module, one file each: terms of the loss that a run names in its configuration. Penalties that belong to a
//! structure are with it.

mod definition;
mod hook;
mod lambda_orthogonality;
mod list;

pub use definition::{MatrixPenalty, PenaltyEntry};
pub use hook::PenaltyHook;
pub use lambda_orthogonality::LambdaOrthogonality;
pub use list::PENALTIES;
