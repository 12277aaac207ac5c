//! Compositions of adapter folders: files in, files out, layer by layer, without a model.
//!
//! [`Sources`] reads adapter folders, and whole fine-tunes as their difference from the base; [`Sources::compose`] runs a composition over their layers.
//! The results go to a plain LoRA folder ([`PlainLora`](super::peft::PlainLora)), to a pool that gives each source back ([`PoolFolder`]), or
//! into the weights of a model folder of any architecture ([`merge_into`]).

mod pool;
mod run;
mod sources;
mod weights;

pub use pool::{PoolFolder, PoolSettings, PoolWriter};
pub use run::{LayerOutcome, Options, Outcome};
pub use sources::{AdapterSource, Sources, linear_layers_of};
pub use weights::merge_into;
