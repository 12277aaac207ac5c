//! Adapters and the layer below them: structures behind one interface, stacks, merging, step hooks.

pub(crate) mod any;
pub(crate) mod base;
pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod entry;
pub(crate) mod error;
pub(crate) mod fingerprint;
pub(crate) mod hooks;
pub(crate) mod initialisation;
pub(crate) mod layers;
pub(crate) mod merge;
pub(crate) mod pass;
pub(crate) mod site;
pub(crate) mod spec;
pub(crate) mod stack;
pub(crate) mod structure;
pub(crate) mod targets;
pub(crate) mod tensors;

pub use any::AnyStructure;
pub use base::{Base, Below};
pub use config::{AdapterConfig, AdapterOptions, Scaling, TrainedBiases};
pub use control::{Control, RowWeights};
pub use entry::StructureEntry;
pub use error::AdapterError;
pub use fingerprint::{base_fingerprint, fingerprint_of_shared, shared_fingerprint};
pub use hooks::{AdapterSteps, add_after_clipping, drop_frozen, frozen_this_step, penalty};
pub use initialisation::Initialisation;
pub use layers::{LinearLayer, biases, linear_layers, linear_weights, saved_parameters};
pub use merge::{UnmergeState, merged, merged_with_unmerge_state, unmerged};
pub use pass::{Input, PassInfo};
pub use site::{GivenTensors, Place, Shared, SharedBytes, SharedTensors, Site, Size};
pub use spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
pub use stack::{Adapter, AdapterStack, each_adapted, each_adapter, is_trained};
pub use structure::{Factors, Method, Penalty, PenaltyAt, StepOf, Structure, Totals};
pub use targets::{NamePattern, Targets};
pub use tensors::NamedTensor;
