//! Low-rank optimizers and gradient rules for any Burn module.
//!
//! - Optimizers with moments in a subspace, each in the file of its name: [`DctAdamWConfig`], [`GaLoreConfig`], [`FiraConfig`],
//!   [`FrugalConfig`], [`LdAdamConfig`], [`ApolloConfig`]; any other combination of their pieces with [`ProjectedConfig`] and a [`Projector`]
//!   of your own.
//! - Optimizers with orthogonal updates: [`MuonConfig`], [`TrionConfig`], [`DionConfig`].
//! - [`AdamW8bitConfig`]: moments of one byte; [`AdamW`]: the measure of the others, in one pass over memory.
//! - [`loro`]: steps of two factors along the manifold of their product, and the optimizer that takes them.
//! - [`HiddenMatrices`]: which parameters of a module they are meant for.
//! - [`rules`]: passes over the gradients of a whole module, such as clipping by their global norm.
//! - [`Hook`]: what a method does around the steps of a training loop, for the trainer, a loop of your own or Burn's `Learner`.
//! - [`StateMeter`]: the bytes that optimizer states really take.
//! - [`registry`]: the list of optimizers by name, with their options and the memory they take.

extern crate alloc;

mod adam;
mod adamw;
mod adamw_8bit;
mod apollo;
mod blocks;
mod check;
mod dct_adamw;
mod dion;
mod error;
mod error_feedback;
mod fira;
mod frugal;
mod galore;
mod hook;
mod ldadam;
pub mod loro;
mod matrix;
mod meter;
mod method;
mod moments;
mod muon;
mod orthogonal;
mod part;
mod path;
mod projected;
mod projector;
mod quantised;
pub mod registry;
mod reset;
mod roles;
pub mod rules;
mod subspace;
mod trion;

// The derive of `RecordState` names these as items of the crate it is used in.
pub(crate) use burn::optim::{RecordState, StateSink, StateSource, join_path};

pub use lowrank_kernels::dct::{Dct, DctBasis};
pub use lowrank_kernels::decompose::{
    PivotedLu, ThinSvd, inverse, leading_directions, orthonormal_factor, pivoted_lu, thin_svd,
};
pub use lowrank_kernels::newton_schulz::{Coefficients, newton_schulz};
pub use lowrank_kernels::random::key_of;
pub use lowrank_kernels::vectorised::vectorised;

pub use adam::AdamOptions;
pub use adamw::{AdamW, AdamWConfig, AdamWState};
pub use adamw_8bit::{AdamW8bit, AdamW8bitConfig, AdamW8bitState};
pub use apollo::ApolloConfig;
pub use blocks::{DynamicMap, dequantise, quantise};
pub use dct_adamw::{DctAdamWConfig, Feedback, Transform};
pub use dion::{Dion, DionConfig, DionState, RightFactor};
pub use error::OptimError;
pub use error_feedback::{ErrorBuffer, ErrorFeedback, QuantisedRow, quantise_row};
pub use fira::FiraConfig;
pub use frugal::{FrugalConfig, InactiveRule};
pub use galore::GaLoreConfig;
pub use hook::{Hook, HookError, Hooks, StepInfo};
pub use ldadam::LdAdamConfig;
pub use matrix::{ByMatrix, ByMatrixState, MatrixRule, Place};
pub use meter::{Metered, StateMeter, StateStore};
pub use moments::{Blocks, Moment, MomentType, Storage};
pub use muon::{MomentumRule, MomentumState, Muon, MuonConfig};
pub use orthogonal::Scaling;
pub use part::{ByPointer, Part, PartVisitor};
pub use path::ModulePath;
pub use projected::{
    BlockOrder, Granularity, Inner, Norm, Projected, ProjectedConfig, ProjectedState, ProjectorKind, RenewAt, Rest,
    Side, States, Target, longer_gap,
};
pub use projector::{
    DctColumns, Gaussian, PowerIteration, Projector, RandomCoordinates, RandomEntries, RandomOrthonormal, Renewal, Svd,
};
pub use quantised::{QuantisedGroups, QuantisedMatrix, quantise_groups};
pub use reset::{Keep, MomentReset, MomentResets, ResetMoments, Resettable};
pub use roles::{HiddenMatrices, Parameter, Role, Stepped, Who};
pub use subspace::Subspace;
pub use trion::{Trion, TrionConfig};
