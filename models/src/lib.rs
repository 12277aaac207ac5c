//! LLaMA models and vision transformers for Burn: the models, their files and their fused operations.
//!
//! - [`Llama`] is a Burn module with the configuration fields and parameter names of Hugging Face's implementation.
//! - [`vit`] contains vision transformers and CLIP.
//! - [`SegmentedModel`] is the interface that training needs of a model: `Llama` implements it, and your own model can.
//! - [`adapter`] attaches trained updates to frozen layers, of this model or of any Burn module.
//! - [`analysis`] computes properties of a model.
//! - [`hub`] reads and writes Hugging Face model folders.
//! - [`generate()`] continues text with a key-value cache.
//! - [`ops`] contains operations with a fused implementation on the CPU backend, usable in any Burn model.
//!
//! Linear weights are stored `[d_in, d_out]`, as Burn does; files hold the transposed `[d_out, d_in]`.

pub mod alignment;
pub mod analysis;
mod error;
pub mod hub;
mod layout;
pub mod linear;
mod llama;
mod segments;
mod storage;
pub mod vit;
mod weights;

pub use lowrank_adapters as adapter;
pub use lowrank_kernels::ops;

pub use error::ModelError;
pub use linear::{Dense, Linear, Parameterization};
pub use llama::{
    Attention, BlockContext, DecoderBlock, Embedding, Family, Features, HeadNorms, KvCache, LanguageBatch,
    LanguageOutput, Llama, LlamaBody, LlamaConfig, LlamaSteps, Mlp, RmsNorm, RopeScaling, Sampling, generate,
    ids_tensor,
};
pub use segments::{
    ForwardPass, Hidden, Rows, Segment, SegmentOf, SegmentedModel, WalkPoint, Walker, WeightedLoss, walk,
};
pub use storage::{BaseStorage, MatrixStorage, StoredMatrix};
pub use vit::{
    ClassifierConfig, ClipClassifier, ClipClassifierConfig, ImageBatch, ImageClassifier, VisionTransformer, VitConfig,
};
pub use weights::{Builder, Choose, Init, Layout, RandomWeights, WeightSource, parameter_id};
