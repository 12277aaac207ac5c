//! Shapes of vision transformers and of CLIP's towers, with the field names of Hugging Face's configurations.

use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::ops::Gelu;

/// Shape and constants of an encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EncoderConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Non-linearity of the feed-forward part.
    pub hidden_act: Gelu,
    /// Constant added to the variance in layer norm.
    pub layer_norm_eps: f64,
    /// Standard deviation of the normal distribution that weights start from.
    pub initializer_range: f64,
}

/// Size of the images and of their patches, in pixels; both are squares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageShape {
    /// Side of an image.
    pub image_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Number of colours.
    pub num_channels: usize,
}

/// Shape of a classifier of images.
pub trait ClassifierConfig: Clone + std::fmt::Debug + PartialEq {
    /// Names of the classes, by number.
    fn labels(&self) -> &[String];

    /// The same shape with other classes.
    fn with_labels(self, labels: Vec<String>) -> Self;

    /// Encoder.
    fn encoder(&self) -> &EncoderConfig;

    /// Images.
    fn image(&self) -> &ImageShape;

    /// Number of trainable parameters.
    fn parameters(&self) -> usize;
}

/// A vision transformer with a classifier, as Hugging Face's `ViTForImageClassification`.
#[derive(Clone, Debug, PartialEq)]
pub struct VitConfig {
    /// Encoder.
    pub encoder: EncoderConfig,
    /// Images.
    pub image: ImageShape,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Names of the classes, by number.
    pub labels: Vec<String>,
}

/// CLIP's vision tower with its projection, as Hugging Face's `CLIPVisionModelWithProjection`.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipVisionConfig {
    /// Encoder.
    pub encoder: EncoderConfig,
    /// Images.
    pub image: ImageShape,
    /// Width of the embeddings.
    pub projection_dim: usize,
}

/// CLIP's text tower.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipTextConfig {
    /// Encoder.
    pub encoder: EncoderConfig,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Longest text in tokens.
    pub max_position_embeddings: usize,
    /// Token whose first position is the text's embedding; 2 means the position of the largest id, as in OpenAI's files.
    pub eos_token_id: i32,
}

/// Both towers, as Hugging Face's `CLIPModel`.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// Vision tower.
    pub vision: ClipVisionConfig,
    /// Text tower.
    pub text: ClipTextConfig,
    /// Logarithm of the factor of the cosines in a new model.
    pub logit_scale_init_value: f64,
}

/// CLIP's vision tower with a classifier, as Hugging Face's `CLIPForImageClassification`, whose configuration has both towers.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipClassifierConfig {
    /// Both towers.
    pub clip: ClipConfig,
    /// Names of the classes, by number.
    pub labels: Vec<String>,
}

/// Named shapes: hidden, intermediate, heads, layers, image side, patch side.
const SHAPES: &[(&str, [usize; 6])] = &[
    ("vit-micro", [96, 384, 4, 4, 32, 4]),
    ("vit-tiny", [192, 768, 3, 12, 224, 16]),
    ("vit-small", [384, 1536, 6, 12, 224, 16]),
    ("vit-base", [768, 3072, 12, 12, 224, 16]),
];

impl EncoderConfig {
    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Rejects a configuration that no model can have, naming the fields.
    pub fn validate(&self) -> Result<(), ModelError> {
        // The largest values keep every product of sizes within 64 bits, whatever values a file contains.
        within(&[
            ("hidden_size", self.hidden_size, 1 << 17),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 10),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
        ])?;
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(ModelError::Config(format!(
                "hidden_size {} is not divisible by num_attention_heads {}; change one of them",
                self.hidden_size, self.num_attention_heads
            )));
        }
        if !(self.layer_norm_eps.is_finite() && self.layer_norm_eps > 0.0) {
            return Err(ModelError::Config(format!(
                "layer_norm_eps is {}; it must be greater than 0",
                self.layer_norm_eps
            )));
        }
        if !(self.initializer_range.is_finite() && self.initializer_range >= 0.0) {
            return Err(ModelError::Config(format!(
                "initializer_range is {}; it must be 0 or greater",
                self.initializer_range
            )));
        }
        Ok(())
    }

    /// Number of parameters of the blocks; `qkv_bias` as in [`VitConfig`].
    fn parameters(&self, qkv_bias: bool) -> usize {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let attention = 4 * hidden * hidden + hidden + if qkv_bias { 3 * hidden } else { 0 };
        self.num_hidden_layers * (attention + 2 * hidden * inner + inner + hidden + 4 * hidden)
    }

    /// Elements that the forward pass of a block keeps for the backward pass, per position, on the CPU backend: its input, the outputs of both
    /// norms, queries, keys, values and the attention's output, the sum after it, and the feed-forward part before and after its
    /// non-linearity, with the constants of norms and softmax.
    pub fn kept(&self) -> usize {
        8 * self.hidden_size + 2 * self.intermediate_size + 4 + self.num_attention_heads
    }

    /// `[d_in, d_out]` of the six linear layers of a block.
    pub fn block_shapes(&self) -> [[usize; 2]; 6] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        [[hidden, hidden], [hidden, hidden], [hidden, hidden], [hidden, hidden], [hidden, inner], [inner, hidden]]
    }
}

impl ImageShape {
    /// Number of patches of an image.
    pub fn patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }

    /// Values of a patch.
    pub fn patch_values(&self) -> usize {
        self.num_channels * self.patch_size * self.patch_size
    }

    fn validate(&self) -> Result<(), ModelError> {
        within(&[
            ("image_size", self.image_size, 1 << 13),
            ("patch_size", self.patch_size, 1 << 10),
            ("num_channels", self.num_channels, 1 << 6),
        ])?;
        if self.image_size < self.patch_size {
            return Err(ModelError::Config(format!(
                "patch_size {} is larger than image_size {}; lower it",
                self.patch_size, self.image_size
            )));
        }
        Ok(())
    }
}

impl VitConfig {
    /// The names that [`VitConfig::named`] knows, smallest model first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|(name, _)| *name)
    }

    /// A named shape for images of three colours, with these classes.
    pub fn named(name: &str, labels: Vec<String>) -> Result<Self, ModelError> {
        let (_, [hidden, inner, heads, layers, image, patch]) =
            *SHAPES.iter().find(|(known, _)| *known == name).ok_or_else(|| ModelError::UnknownShape {
                name: name.to_string(),
                known: Self::names().collect::<Vec<_>>().join(", "),
            })?;
        Ok(Self {
            encoder: EncoderConfig {
                hidden_size: hidden,
                intermediate_size: inner,
                num_hidden_layers: layers,
                num_attention_heads: heads,
                hidden_act: Gelu::Exact,
                layer_norm_eps: 1e-12,
                initializer_range: 0.02,
            },
            image: ImageShape { image_size: image, patch_size: patch, num_channels: 3 },
            qkv_bias: true,
            labels,
        })
    }

    /// Rejects a configuration that no model can have, naming the fields.
    pub fn validate(&self) -> Result<(), ModelError> {
        self.encoder.validate()?;
        self.image.validate()?;
        within(&[("number of labels", self.labels.len(), 1 << 20)])
    }

    /// Number of positions: the patches and the class token.
    pub fn positions(&self) -> usize {
        self.image.patches() + 1
    }
}

impl ClassifierConfig for VitConfig {
    fn labels(&self) -> &[String] {
        &self.labels
    }

    fn with_labels(self, labels: Vec<String>) -> Self {
        Self { labels, ..self }
    }

    fn encoder(&self) -> &EncoderConfig {
        &self.encoder
    }

    fn image(&self) -> &ImageShape {
        &self.image
    }

    fn parameters(&self) -> usize {
        let hidden = self.encoder.hidden_size;
        let entry = self.image.patch_values() * hidden + hidden + hidden + self.positions() * hidden;
        entry + self.encoder.parameters(self.qkv_bias) + 2 * hidden + (hidden + 1) * self.labels.len()
    }
}

impl ClipVisionConfig {
    /// Rejects a configuration that no model can have, naming the fields.
    pub fn validate(&self) -> Result<(), ModelError> {
        self.encoder.validate()?;
        self.image.validate()?;
        within(&[("projection_dim", self.projection_dim, 1 << 17)])
    }
}

impl Default for ClipTextConfig {
    /// The text tower of OpenAI's smaller models, which `transformers` takes where a configuration has none.
    fn default() -> Self {
        Self {
            encoder: EncoderConfig {
                hidden_size: 512,
                intermediate_size: 2048,
                num_hidden_layers: 12,
                num_attention_heads: 8,
                hidden_act: Gelu::Quick,
                layer_norm_eps: 1e-5,
                initializer_range: 0.02,
            },
            vocab_size: 49_408,
            max_position_embeddings: 77,
            eos_token_id: 49_407,
        }
    }
}

impl ClipConfig {
    /// Logarithm of the factor of the cosines in a new model where a configuration has none.
    pub const LOGIT_SCALE: f64 = 2.6592;

    /// The vision tower of a model that has none for texts.
    pub fn of_vision(vision: ClipVisionConfig) -> Self {
        Self { vision, text: ClipTextConfig::default(), logit_scale_init_value: Self::LOGIT_SCALE }
    }

    /// Rejects a configuration that no model can have, naming the fields.
    pub fn validate(&self) -> Result<(), ModelError> {
        self.vision.validate()?;
        self.text.encoder.validate()?;
        within(&[
            ("vocab_size", self.text.vocab_size, 1 << 25),
            ("max_position_embeddings", self.text.max_position_embeddings, 1 << 26),
        ])
    }
}

impl ClipClassifierConfig {
    /// Rejects a configuration that no model can have, naming the fields.
    pub fn validate(&self) -> Result<(), ModelError> {
        self.clip.validate()?;
        within(&[("number of labels", self.labels.len(), 1 << 20)])
    }
}

impl ClassifierConfig for ClipClassifierConfig {
    fn labels(&self) -> &[String] {
        &self.labels
    }

    fn with_labels(self, labels: Vec<String>) -> Self {
        Self { labels, ..self }
    }

    fn encoder(&self) -> &EncoderConfig {
        &self.clip.vision.encoder
    }

    fn image(&self) -> &ImageShape {
        &self.clip.vision.image
    }

    fn parameters(&self) -> usize {
        let ClipVisionConfig { encoder, image, .. } = &self.clip.vision;
        let hidden = encoder.hidden_size;
        let entry = image.patch_values() * hidden + hidden + (image.patches() + 1) * hidden;
        entry + encoder.parameters(true) + 4 * hidden + (hidden + 1) * self.labels.len()
    }
}

/// Rejects the first field that is 0 or above its largest value.
fn within(fields: &[(&str, usize, usize)]) -> Result<(), ModelError> {
    match fields.iter().find(|(_, value, most)| *value == 0 || value > most) {
        None => Ok(()),
        Some((field, value, most)) => {
            Err(ModelError::Config(format!("{field} is {value}; it must be from 1 to {most}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_shapes_have_the_published_parameter_counts() {
        let labels = |count: usize| (0..count).map(|label| label.to_string()).collect();
        // The counts of timm's and transformers' models with 1,000 classes.
        for (name, classes, published) in [
            ("vit-tiny", 1000, 5_717_416),
            ("vit-small", 1000, 22_050_664),
            ("vit-base", 1000, 86_567_656),
            ("vit-micro", 10, 459_562),
        ] {
            let config = VitConfig::named(name, labels(classes)).unwrap();
            config.validate().unwrap();
            assert_eq!(config.parameters(), published, "{name}");
        }
    }

    #[test]
    fn refusals_name_the_field() {
        let good = VitConfig::named("vit-micro", vec!["a".into()]).unwrap();
        let message = |change: fn(&mut VitConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(message(|c| c.encoder.hidden_size = 0).contains("hidden_size"));
        assert!(message(|c| c.encoder.num_attention_heads = 5).contains("num_attention_heads"));
        assert!(message(|c| c.encoder.layer_norm_eps = f64::NAN).contains("layer_norm_eps"));
        assert!(message(|c| c.image.patch_size = 64).contains("patch_size"));
        assert!(message(|c| c.labels.clear()).contains("labels"));
        assert!(VitConfig::named("vit-huge", Vec::new()).unwrap_err().to_string().contains("vit-micro"));
    }
}
