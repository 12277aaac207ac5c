//! Low-rank optimizers and gradient rules for any Burn module.
//!
//! - Optimizers with moments in a subspace, each in the file of its name: [`DctAdamWConfig`], [`GaLoreConfig`], [`FiraConfig`],
//!   [`FrugalConfig`], [`LdAdamConfig`], [`ApolloConfig`]; any other combination of their pieces with [`ProjectedConfig`] and a [`Projector`]
//!   of your own.
//! - Optimizers with orthogonal updates: [`MuonConfig`], [`TrionConfig`], [`DionConfig`].
//! - [`WeightStorage`]: trained weights in one to four bytes, under any of these.
//! - [`ScaleConfig`]: normalised descent, with momentum in the head alone.
//! - [`AdamW8bitConfig`]: 8-bit moments; [`AdamW`]: the reference for the others, in one pass over memory.
//! - [`loro`]: steps of two factors along the manifold of their product, and the optimizer that takes them.
//! - [`ParameterRoles`]: the parameters of a module that they are meant for.
//! - [`GlobalNormClip`]: clipping by the norm of all gradients together.
//! - [`rules`]: passes over the gradients of a whole module that work on pairs of factors.
//! - [`Hook`]: actions of a method around the steps of a training loop, for the trainer, a loop of your own or Burn's `Learner`.
//! - [`StateMeter`]: the bytes that optimizer states actually use.
//! - [`registry`]: the list of optimizers by name, with their options and the memory they take.

extern crate alloc;

mod adam;
mod change;
mod check;
mod clip;
mod error;
mod hook;
mod matrix;
mod matrix_id;
mod method;
mod methods;
mod parameters;
mod part;
mod path;
mod precision;
mod projected;
pub mod registry;
pub mod rules;
mod state;
mod storage;

// The derive of `RecordState` names these as items of the crate it is used in.
pub(crate) use burn::optim::{RecordState, StateSink, StateSource, join_path};

pub use lowrank_kernels::dct::{Dct, DctBasis};
pub use lowrank_kernels::decompose::{
    DirectionsError, PivotedLu, ThinSvd, inverse, leading_directions, orthonormal_factor, pivoted_lu, thin_svd,
};
pub use lowrank_kernels::newton_schulz::{Coefficients, newton_schulz};
pub use lowrank_kernels::random::key_of;
pub use lowrank_kernels::vectorised::vectorised;

pub use adam::AdamOptions;
pub use change::WeightChange;
pub use clip::{Clipped, GlobalNormClip};
pub use error::OptimError;
pub use hook::{Hook, HookError, Hooks, Losses, StepInfo};
pub use lowrank_kernels::narrow;
pub use matrix::{ByMatrix, ByMatrixState, MatrixRule};
pub use matrix_id::MatrixId;
pub use method::{MethodConfig, Table};
pub use methods::adamw::{AdamW, AdamWConfig, AdamWState};
pub use methods::adamw_8bit::{AdamW8bit, AdamW8bitConfig, AdamW8bitState, MomentCodes};
pub use methods::apollo::ApolloConfig;
pub use methods::dct_adamw::{DctAdamWConfig, Transform};
pub use methods::dion::{Dion, DionConfig, DionState, RightFactor};
pub use methods::fira::FiraConfig;
pub use methods::frugal::{FrugalConfig, InactiveRule};
pub use methods::galore::GaLoreConfig;
pub use methods::ldadam::LdAdamConfig;
pub use methods::loro;
pub use methods::muon::{MomentumRule, MomentumState, Muon, MuonConfig};
pub use methods::orthogonal::{NewtonSchulzOptions, OrthogonalOptions, Scaling};
pub use methods::scale::{Normalisation, Scale, ScaleConfig, ScaleState};
pub use methods::trion::{Trion, TrionConfig};
pub use parameters::{AssignedTo, Assignment, Parameter, ParameterRoles, Role};
pub use part::{ByPointer, Part, PartVisitor};
pub use path::{ModulePath, ParameterVisitor, parameter_id, visit_parameters};
pub use projected::config::{
    BlockOrder, Granularity, Inner, Norm, OnRenewal, ProjectFrom, ProjectedConfig, ProjectorKind, RenewAt, Residual,
    Side,
};
pub use projected::projector::{
    DctColumns, Gaussian, PowerIteration, Projector, RandomCoordinates, RandomEntries, RandomOrthonormal, Renewal,
    RenewalFailures, Svd, renewal_failures,
};
pub use projected::state::ProjectedState;
pub use projected::step::{Projected, longer_gap};
pub use projected::subspace::Subspace;
pub use state::error_feedback::{ErrorBuffer, ErrorFeedback, QuantisedRow, quantise_row};
pub use state::meter::{Metered, StateMeter};
pub use state::moments::{Moment, MomentType, QuantisedMoment, Storage};
pub use state::quantised::QuantisedMatrix;
pub use state::rate::AtRate;
pub use state::reset::{MomentReset, MomentResets, ResetMoments, ResetOrder, Resettable};
pub use state::store::{StateStore, Stored};
pub use storage::{Narrow, NarrowState, WeightStorage, requantised, stored};
