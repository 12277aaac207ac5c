//! The linear layer that every weight matrix of a block goes through, and the parameterizations that can replace its dense weight.
//!
//! Matrices are stored `[d_in, d_out]` and `y = x W`; the papers and the files write the transposes, `d_out x d_in`.

pub mod cola;
mod dense;
mod layer;
pub mod loro;
pub mod lost;
pub mod low_rank;
mod parameterization;
mod registry;
pub mod relora;
pub mod sltrain;
mod steps;

pub use dense::{Dense, DenseOptions};
pub use layer::{LinearLayer, NamedLayer};
pub use parameterization::{LinearMethod, ParameterizationSpec, RestartPlan};
pub use registry::{Linear, PARAMETERIZATIONS, Parameterization, ParameterizationEntry};
pub use steps::{LinearSteps, OptimizerRequest, RunFacts, StateChange};

#[cfg(all(test, feature = "flex"))]
mod tests;
