//! Adapters: trained changes of a layer whose weight is frozen.
//!
//! An adapter has a structure ([`STRUCTURES`], each in the file of its name), an initialisation, a scaling and a
//! training rule; [`AdapterConfig`] selects one, [`Attach`] attaches it to the linear layers of any Burn module. There
//! Burn composes the weight; on layers that call [`AdapterStack::linear`] for their output, adapters run factored, so
//! that neither the dense update nor the dense gradient of the weight is formed.
//!
//! The base weight is never changed: an initial product that is part of the weight is subtracted from it. Disabling an
//! adapter ([`Control::switch`]) or removing it ([`detach`]) restores the base weights bit for bit.
//!
//! To add a structure, copy `lora.rs`, implement [`Structure`] and [`Method`], and list it in `structures/mod.rs`;
//! [`register`] adds a structure of another crate.
//!
//! Imports go one way: `ground` (what an adapter is) < `init` < `structures` < `registry` < `apply` (on the layers of a module) < `rule`, `allocation`, `penalty`, `compose`
//! (several adapters made into one).

mod allocation;
mod apply;
#[cfg(test)]
mod bench;
pub mod compose;
mod ground;
mod init;
mod penalty;
#[cfg(test)]
mod refusals;
mod registry;
mod rule;
mod structures;

pub use allocation::*;
pub use apply::{
    Adapted, Attach, BaseGradients, LayerFactors, MakeStructure, Report, Resize, SHARED, adapters_of, detach,
    factors_of, resize, sizes, start_of,
};
pub use ground::{
    Adapter, AdapterConfig, AdapterError, AdapterOptions, AdapterStack, AdapterSteps, Alpha, AnyStructure, Base, Below,
    Control, Factors, GivenTensors, Initialisation, Input, LinearLayer, Method, NamePattern, NamedTensor, PassInfo,
    Penalty, PenaltyAt, Place, Rank, RowWeights, Scaling, Shared, SharedBytes, SharedTensors, Site, Size, Spec, StepOf,
    Structure, StructureEntry, Targets, TensorRole, TensorSpec, Totals, TrainedBiases, UnmergeState,
    add_after_clipping, base_fingerprint, biases, drop_frozen, each_adapted, each_adapter, fingerprint_of_shared,
    frozen_this_step, is_trained, linear_layers, linear_weights, merged, merged_with_unmerge_state, penalty,
    saved_parameters, shared_fingerprint, unmerged,
};
pub use penalty::{LambdaOrthogonality, MatrixPenalty, PENALTIES, PenaltyEntry, PenaltyHook};
pub use registry::{initialisations, register};
pub use rule::{AlloraRule, LoraFaRule, LoraPlusRule, LoraProRule, PlainRule, RULES, Rule, RuleEntry};
pub use structures::*;
