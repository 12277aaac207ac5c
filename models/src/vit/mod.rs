//! Vision transformers and CLIP, on one encoder.

mod clip;
mod config;
mod encoder;
mod model;
mod patches;

pub use clip::{
    Clip, ClipEncoder, ClipTextEmbeddings, ClipTextTower, ClipVision, ClipVisionEmbeddings, ClipVisionTower,
};
pub use config::{ClipConfig, ClipTextConfig, ClipVisionConfig, EncoderConfig, ImageShape, VitConfig};
pub use encoder::{ClipAttention, ClipBlock, EncoderMlp, LayerNorm, Sight, VitAttention, VitBlock};
pub use model::{ImageBatch, VisionTransformer, VitBody, VitEmbeddings, VitPatches};
pub use patches::PatchProjection;
