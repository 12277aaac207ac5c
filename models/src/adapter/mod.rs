//! Adapters: trained changes of a layer whose weight stays as it is.
//!
//! An adapter has a structure ([`STRUCTURES`], each in the file of its name), a start, a scaling and a training rule; [`AdapterConfig`] asks for
//! one, [`Attach`] puts it on the linear layers of any Burn module. There Burn composes the weight; on the layers of this crate adapters run
//! factored, so that neither the dense update nor the dense gradient of the weight is formed.
//!
//! The base weight is never changed: an adapter that begins as part of the weight takes that part from what it stands on. Switching one off
//! ([`Control::switch`]) or taking it off ([`detach`]) gives the bits of the base.
//!
//! To add a structure, copy `lora.rs`, implement [`Structure`] and [`Method`], and add a line to the list in `registry.rs`.

mod allora;
mod attach;
mod base;
#[cfg(test)]
mod bench;
mod block_lora;
mod bone;
mod collect;
mod config;
mod control;
mod convert;
mod dora;
mod error;
mod fingerprint;
mod hooks;
mod hydra;
mod init;
mod layers;
mod loca;
mod loldu;
mod lora;
mod lora_xs;
mod merge;
mod modes;
mod nola;
mod randlora;
#[cfg(test)]
mod refusals;
mod registry;
mod resolve;
mod rule;
mod salt;
mod site;
mod sorsa;
mod spec;
mod stack;
mod structure;
mod svfit;
mod targets;
mod tensors;
mod tera;
mod tlora;
mod vera;
mod wara;

pub use allora::{Allora, AlloraOptions};
pub use attach::{Adapted, Attach, BaseGradients, Report, SHARED, adapters_of, detach};
pub use base::{Base, Input};
pub use block_lora::{BlockLora, BlockLoraOptions};
pub use bone::{Bone, BoneBlock, BoneMode, BoneOptions};
pub use collect::collect_gradients;
pub use config::{AdapterConfig, AdapterOptions, Scaling};
pub use control::Control;
pub use dora::{Dora, DoraOptions};
pub use error::AdapterError;
pub use fingerprint::{base_fingerprint, shared_fingerprint};
pub use hooks::{AdapterSteps, add_after_clipping, drop_resting, penalty, resting};
pub use hydra::{Hydra, HydraOptions};
pub use init::{asks_for_gradients, leaves_the_base};
pub use layers::linear_layers;
pub use loca::{Loca, LocaOptions};
pub use loldu::{LoLdu, LoLduOptions, PivotStart};
pub use lora_xs::{LoraXs, LoraXsOptions};
pub use merge::{WayBack, merged, merged_with_way_back, unmerged};
pub use nola::{Nola, NolaOptions, Variant};
pub use randlora::{Draws, RandLora, RandLoraOptions};
pub use registry::{AnyStructure, STRUCTURES, StructureEntry};
pub use rule::{GradientRule, RULES, Rule, RuleEntry};
pub use salt::{Salt, SaltOptions, SaltRelu};
pub use site::{GivenTensors, Place, Shared, SharedBytes, Site};
pub use sorsa::{Sorsa, SorsaOptions};
pub use spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
pub use stack::{Adapter, Attached, each_adapted, each_adapter, is_trained};
pub use structure::{Method, Penalty, PenaltyAt, StepOf, Structure};
pub use svfit::{SvFit, SvFitOptions};
pub(crate) use targets::NamePattern;
pub use targets::Targets;
pub use tensors::NamedTensor;
pub use tera::{Tera, TeraOptions};
pub use tlora::{Regulariser, Residual, TLora, TLoraOptions};
pub use vera::{Vera, VeraOptions};
pub use wara::{Wara, WaraOptions, Wavelet};
