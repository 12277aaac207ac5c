//! The LLaMA model, its configuration and the generation of text with it.

mod batch;
mod block;
mod cache;
mod config;
mod family;
mod generate;
mod learner;
mod model;
mod norm;
mod rope;
mod steps;

pub use batch::LanguageBatch;
pub use block::{Attention, BlockContext, DecoderBlock, Mlp};
pub use cache::KvCache;
pub use config::LlamaConfig;
pub(crate) use config::MOST_LAYERS;
pub use family::{Family, Features, HeadNorms};
pub(crate) use generate::generate_by;
pub use generate::{Sampling, generate};
pub use learner::LanguageOutput;
pub use model::{Embedding, Llama, LlamaBody, ids_tensor};
pub use norm::RmsNorm;
pub use rope::RopeScaling;
pub use steps::LlamaSteps;
