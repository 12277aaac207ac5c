//! LLaMA models for Burn: the model, its files and the fused operations it is made of.
//!
//! - [`Llama`] is a Burn module with the configuration fields and parameter names of Hugging Face's implementation.
//! - [`adapter`] puts trained changes on frozen layers, of this model or of any Burn module.
//! - [`hub`] reads and writes Hugging Face model folders.
//! - [`generate()`] continues text with a key-value cache.
//! - [`ops`] are the operations with a fast form on the CPU backend, usable in any Burn model.
//!
//! Linear weights are stored `[d_in, d_out]`, as Burn does; files hold the transposed `[d_out, d_in]`.

pub mod adapter;
mod batch;
mod block;
mod cache;
mod config;
mod error;
mod generate;
pub mod hub;
pub mod linear;
mod llama;
mod norm;
pub mod ops;
mod weights;

pub use batch::{LanguageBatch, LanguageOutput};
pub use block::{Attention, BlockContext, DecoderBlock, Mlp};
pub use cache::KvCache;
pub use config::LlamaConfig;
pub use error::ModelError;
pub use generate::{Sampling, generate};
pub use linear::{Dense, Linear, Parameterization};
pub use llama::{Embedding, Llama, LlamaBody, ids_tensor};
pub use norm::RmsNorm;
pub use weights::{Choose, Init, Layout, RandomWeights, WeightSource, parameter_id};
