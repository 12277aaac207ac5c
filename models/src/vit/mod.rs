//! Vision transformers and CLIP, on one encoder.

mod clip;
mod config;
mod encoder;
mod model;
mod patches;

pub use clip::{
    Clip, ClipClassifier, ClipEncoder, ClipTextEmbeddings, ClipTextTower, ClipVision, ClipVisionEmbeddings,
    ClipVisionTower,
};
pub use config::{
    ClassifierConfig, ClipClassifierConfig, ClipConfig, ClipTextConfig, ClipVisionConfig, EncoderConfig, ImageShape,
    VitConfig,
};
pub use encoder::{ClipAttention, ClipBlock, EncoderMlp, LayerNorm, Sight, VitAttention, VitBlock};
pub use model::{ImageBatch, ImageClassifier, VisionTransformer, VitBody, VitEmbeddings, VitPatches};
pub use patches::PatchProjection;
