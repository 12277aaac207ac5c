//! CLIP: an encoder of images and one of texts, whose embeddings meet in one space.
//!
//! "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020). Fields carry the names of Hugging Face's
//! implementation, so that the path of a parameter is its name in a model file.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::config::{ClipClassifierConfig, ClipConfig, ClipTextConfig, ClipVisionConfig, EncoderConfig};
use super::encoder::{ClipBlock, LayerNorm, Sight, dense};
use super::model::{ImageBatch, ImageClassifier, cross_entropy, trained};
use super::patches::{PatchProjection, with_class_token};
use crate::error::ModelError;
use crate::linear::Dense;
use crate::llama::Embedding;
use crate::segments::{Rows, Segment, SegmentedModel};
use crate::weights::{Builder, Init, Layout, RandomWeights, WeightSource};
use lowrank_adapters::{AdapterError, Attach, Report};

/// Blocks of a tower.
#[derive(Module, Debug)]
pub struct ClipEncoder {
    /// Blocks, first to last.
    pub layers: Vec<ClipBlock>,
}

/// Class token, patches and positions of images.
#[derive(Module, Debug)]
pub struct ClipVisionEmbeddings {
    /// Class token `[hidden_size]`.
    pub class_embedding: Param<Tensor<1>>,
    /// Patches.
    pub patch_embedding: PatchProjection,
    /// Positions `[patches + 1, hidden_size]`.
    pub position_embedding: Embedding,
}

/// Encoder of images.
#[derive(Module, Debug)]
pub struct ClipVisionTower {
    /// Input of the encoder.
    pub embeddings: ClipVisionEmbeddings,
    /// Norm before the first block, spelled as in the files.
    pub pre_layrnorm: LayerNorm,
    /// Blocks.
    pub encoder: ClipEncoder,
    /// Norm of the class token after the last block.
    pub post_layernorm: LayerNorm,
}

/// Tokens and positions of texts.
#[derive(Module, Debug)]
pub struct ClipTextEmbeddings {
    /// Tokens `[vocab_size, hidden_size]`.
    pub token_embedding: Embedding,
    /// Positions `[max_position_embeddings, hidden_size]`.
    pub position_embedding: Embedding,
}

/// Encoder of texts.
#[derive(Module, Debug)]
pub struct ClipTextTower {
    /// Input of the encoder.
    pub embeddings: ClipTextEmbeddings,
    /// Blocks.
    pub encoder: ClipEncoder,
    /// Norm after the last block.
    pub final_layer_norm: LayerNorm,
    #[module(skip)]
    config: ClipTextConfig,
}

/// Encoder of images with its projection.
#[derive(Module, Debug)]
pub struct ClipVision {
    /// Encoder.
    pub vision_model: ClipVisionTower,
    /// Projection `[hidden_size, projection_dim]`.
    pub visual_projection: Dense,
    #[module(skip)]
    config: ClipVisionConfig,
}

/// Encoder of images with a classifier of the mean of the patches.
#[derive(Module, Debug)]
pub struct ClipClassifier {
    /// Encoder; its last norm is in the files and has no part in the classes.
    pub vision_model: ClipVisionTower,
    /// Classifier `[hidden_size, labels]`.
    pub classifier: Dense,
    #[module(skip)]
    config: ClipClassifierConfig,
}

/// Both encoders.
#[derive(Module, Debug)]
pub struct Clip {
    /// Encoder of texts.
    pub text_model: ClipTextTower,
    /// Encoder of images.
    pub vision_model: ClipVisionTower,
    /// Projection of images `[hidden_size, projection_dim]`.
    pub visual_projection: Dense,
    /// Projection of texts `[hidden_size, projection_dim]`.
    pub text_projection: Dense,
    /// Logarithm of the factor of the cosines `[1]`; a scalar in the files.
    pub logit_scale: Param<Tensor<1>>,
    #[module(skip)]
    config: ClipConfig,
}

impl ClipEncoder {
    fn build(builder: &mut Builder, path: &str, config: &EncoderConfig) -> Result<Self, ModelError> {
        let layers = (0..config.num_hidden_layers)
            .map(|layer| ClipBlock::build(builder, &format!("{path}.layers.{layer}"), config, true))
            .collect::<Result<_, _>>()?;
        Ok(Self { layers })
    }

    fn forward(&self, x: Tensor<3>, sight: &Sight) -> Tensor<3> {
        self.layers.iter().fold(x, |x, block| block.forward(x, sight))
    }
}

fn table(builder: &mut Builder, path: &str, shape: [usize; 2]) -> Result<Embedding, ModelError> {
    Ok(Embedding { weight: builder.matrix(&format!("{path}.weight"), shape, Layout::AsStored, Init::Standard)? })
}

impl ClipVisionTower {
    fn build(builder: &mut Builder, config: &ClipVisionConfig) -> Result<Self, ModelError> {
        let (encoder, hidden) = (&config.encoder, config.encoder.hidden_size);
        let positions = [config.image.patches() + 1, hidden];
        let at = |name: &str| format!("vision_model.{name}");
        Ok(Self {
            embeddings: ClipVisionEmbeddings {
                class_embedding: builder.vector(&at("embeddings.class_embedding"), hidden, Init::Standard)?,
                patch_embedding: PatchProjection::build(
                    builder,
                    &at("embeddings.patch_embedding"),
                    &config.image,
                    hidden,
                    false,
                )?,
                position_embedding: table(builder, &at("embeddings.position_embedding"), positions)?,
            },
            pre_layrnorm: LayerNorm::build(builder, &at("pre_layrnorm"), encoder)?,
            encoder: ClipEncoder::build(builder, &at("encoder"), encoder)?,
            post_layernorm: LayerNorm::build(builder, &at("post_layernorm"), encoder)?,
        })
    }

    /// Output of the last block `[batch, patches + 1, hidden_size]` for pixels `[batch, num_channels, image_size, image_size]`.
    pub fn hidden(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.encoder.forward(self.entered(pixels), &Sight::all())
    }

    fn entered(&self, pixels: Tensor<4>) -> Tensor<3> {
        let patches = self.embeddings.patch_embedding.forward(pixels);
        let token = self.embeddings.class_embedding.val().unsqueeze();
        let entered = with_class_token(token, patches, self.embeddings.position_embedding.weight.val().unsqueeze());
        self.pre_layrnorm.forward(entered)
    }

    /// Class token `[batch, hidden_size]` after the last norm, from the output of the last block.
    pub fn pooled(&self, hidden: Tensor<3>) -> Tensor<2> {
        let [batch, _, width] = hidden.dims();
        self.post_layernorm.forward(hidden.slice([0..batch, 0..1]).reshape([batch, width]))
    }
}

impl ClipTextTower {
    fn build(builder: &mut Builder, config: &ClipTextConfig) -> Result<Self, ModelError> {
        let (encoder, hidden) = (&config.encoder, config.encoder.hidden_size);
        let at = |name: &str| format!("text_model.{name}");
        let positions = [config.max_position_embeddings, hidden];
        Ok(Self {
            embeddings: ClipTextEmbeddings {
                token_embedding: table(builder, &at("embeddings.token_embedding"), [config.vocab_size, hidden])?,
                position_embedding: table(builder, &at("embeddings.position_embedding"), positions)?,
            },
            encoder: ClipEncoder::build(builder, &at("encoder"), encoder)?,
            final_layer_norm: LayerNorm::build(builder, &at("final_layer_norm"), encoder)?,
            config: config.clone(),
        })
    }

    /// Embedding `[batch, hidden_size]` of the end token of each text, before the projection.
    ///
    /// `mask`, if given, has 0 for padding, as tokenizers give it. Padding before the end token is supported at the start of a text alone.
    pub fn pooled(&self, texts: &[Vec<i32>], mask: Option<&[Vec<i32>]>) -> Result<Tensor<2>, ModelError> {
        let places = texts.iter().map(|ids| self.end(ids)).collect::<Result<Vec<usize>, _>>()?;
        let starts = match mask {
            Some(mask) => starts(mask, &places)?,
            None => vec![0; texts.len()],
        };
        let table = self.embeddings.token_embedding.weight.val();
        let device = table.device().inner();
        let (batch, positions) = (texts.len(), texts.first().map_or(0, Vec::len));
        if batch == 0 || texts.iter().any(|ids| ids.len() != positions) {
            return Err(ModelError::Config("texts of a batch must be there and have the same length; pad them".into()));
        }
        let numbers = |values: Vec<i32>| TensorData::new(values, [batch, positions]);
        let ids: Tensor<2, Int> = Tensor::from_data(numbers(texts.concat()), &device);
        let places_of = self.embeddings.position_embedding.weight.val().narrow(0, 0, positions).unsqueeze();
        let entered = crate::ops::embedding(table, ids) + places_of;
        let first = starts.iter().any(|start| *start > 0).then(|| {
            let of = |position: usize, start: i32| if position as i32 >= start { start } else { 0 };
            let rows = starts.iter().flat_map(|start| (0..positions).map(move |position| of(position, *start)));
            Tensor::from_data(numbers(rows.collect()), &device)
        });
        let hidden = self.encoder.forward(entered, &Sight::earlier(first));
        let [_, _, width] = hidden.dims();
        let rows: Vec<i32> = places.iter().enumerate().map(|(row, place)| (row * positions + place) as i32).collect();
        let rows: Tensor<1, Int> = Tensor::from_data(TensorData::new(rows, [batch]), &device);
        let ends = hidden.reshape([batch * positions, width]).select(0, rows);
        Ok(self.final_layer_norm.forward(ends))
    }

    /// Position of the token whose hidden state is the embedding of a text.
    fn end(&self, ids: &[i32]) -> Result<usize, ModelError> {
        let ClipTextConfig { vocab_size, max_position_embeddings: most, eos_token_id, .. } = self.config;
        if ids.len() > most {
            let reason = format!("a text has {} tokens; the model takes at most {most}: shorten it", ids.len());
            return Err(ModelError::Config(reason));
        }
        let unknown = |id: &i32| usize::try_from(*id).map_or(true, |id| id >= vocab_size);
        if let Some(position) = ids.iter().position(unknown) {
            return Err(ModelError::TokenId { id: ids[position].into(), position, vocab_size });
        }
        // Configurations of OpenAI's files name a wrong end token; there it is the one with the largest id.
        let end = match eos_token_id {
            2 => ids.iter().max().and_then(|most| ids.iter().position(|id| id == most)),
            end => ids.iter().position(|id| *id == end),
        };
        end.ok_or_else(|| {
            ModelError::Config(format!(
                "a text has no end token, {eos_token_id}; let the tokenizer of the model add it"
            ))
        })
    }
}

/// First position of each text that is no padding, from masks with 0 for padding. Padding after the end token has no influence on it.
fn starts(mask: &[Vec<i32>], ends: &[usize]) -> Result<Vec<i32>, ModelError> {
    let start = |(mask, end): (&Vec<i32>, &usize)| {
        let before = &mask[..=*end.min(&mask.len().saturating_sub(1))];
        let start = before.iter().take_while(|shown| **shown == 0).count();
        match before[start..].iter().all(|shown| *shown != 0) && start < before.len() {
            true => Ok(start as i32),
            false => Err(ModelError::Config(format!(
                "attention_mask {mask:?} hides positions inside a text, or its end token; only padding before and after it is supported"
            ))),
        }
    };
    mask.iter().zip(ends).map(start).collect()
}

impl ClipVision {
    /// A model with random weights that depend on the seed alone.
    pub fn random(config: &ClipVisionConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        Self::build(config, &mut RandomWeights { seed, std: config.encoder.initializer_range }, device)
    }

    /// A model whose weights come from `source`. On an autodiff device every parameter is trainable.
    pub fn build(
        config: &ClipVisionConfig,
        source: &mut dyn WeightSource,
        device: &Device,
    ) -> Result<Self, ModelError> {
        config.validate()?;
        let mut builder = Builder::new(source, device);
        let shape = [config.encoder.hidden_size, config.projection_dim];
        Ok(Self {
            vision_model: ClipVisionTower::build(&mut builder, config)?,
            visual_projection: dense(&mut builder, "visual_projection", shape, false)?,
            config: config.clone(),
        })
    }

    /// The configuration the model was built from.
    pub fn config(&self) -> &ClipVisionConfig {
        &self.config
    }

    /// Embeddings `[batch, projection_dim]`, of any length.
    pub fn image_embeds(&self, pixels: Tensor<4>) -> Tensor<2> {
        let tower = &self.vision_model;
        self.visual_projection.forward(tower.pooled(tower.hidden(pixels)))
    }

    /// Attaches an adapter to the matching linear layers and freezes everything else.
    pub fn attach(self, attach: Attach) -> Result<(Self, Report), AdapterError> {
        attach.factored().to(self)
    }
}

impl ClipClassifier {
    /// A model with random weights that depend on the seed alone.
    pub fn random(config: &ClipClassifierConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let std = config.clip.vision.encoder.initializer_range;
        Self::build(config, &mut RandomWeights { seed, std }, device)
    }

    /// A model whose weights come from `source`. On an autodiff device every parameter is trainable.
    pub fn build(
        config: &ClipClassifierConfig,
        source: &mut dyn WeightSource,
        device: &Device,
    ) -> Result<Self, ModelError> {
        config.validate()?;
        let mut builder = Builder::new(source, device);
        let vision = &config.clip.vision;
        let shape = [vision.encoder.hidden_size, config.labels.len()];
        let tower = ClipVisionTower::build(&mut builder, vision)?;
        Ok(Self {
            // No class depends on it, so that it has no gradient.
            vision_model: ClipVisionTower { post_layernorm: tower.post_layernorm.no_grad(), ..tower },
            classifier: dense(&mut builder, "classifier", shape, true)?,
            config: config.clone(),
        })
    }

    /// The configuration the model was built from.
    pub fn config(&self) -> &ClipClassifierConfig {
        &self.config
    }

    /// Attaches an adapter to the matching linear layers and freezes everything else.
    pub fn attach(self, attach: Attach) -> Result<(Self, Report), AdapterError> {
        attach.factored().to(self)
    }

    /// Mean of the patches `[batch, hidden_size]`, from the output of the last block.
    pub fn pooled(&self, hidden: Tensor<3>) -> Tensor<2> {
        let [batch, positions, width] = hidden.dims();
        hidden.slice([0..batch, 1..positions]).mean_dim(1).reshape([batch, width])
    }

    /// Logits `[batch, labels]` from the output of the last block.
    pub fn logits_of(&self, hidden: Tensor<3>) -> Tensor<2> {
        self.classifier.forward(self.pooled(hidden))
    }
}

impl ImageClassifier for ClipClassifier {
    fn logits(&self, pixels: Tensor<4>) -> Tensor<2> {
        self.logits_of(self.vision_model.hidden(pixels))
    }

    fn with_trained_classifier(mut self) -> Self {
        self.classifier = trained(self.classifier);
        self
    }
}

impl SegmentedModel for ClipClassifier {
    type Batch = ImageBatch;
    type Hidden = Tensor<3>;
    type Context = ();

    fn context(&self, _: &ImageBatch) {}

    fn enter(&self, batch: &ImageBatch, _: &()) -> Tensor<3> {
        self.vision_model.entered(batch.pixels.clone())
    }

    fn blocks(&self) -> usize {
        self.vision_model.encoder.layers.len()
    }

    fn block(&self, number: usize, x: Tensor<3>, _: &()) -> Tensor<3> {
        self.vision_model.encoder.layers[number].forward(x, &Sight::all())
    }

    fn loss(&self, x: Tensor<3>, batch: &ImageBatch) -> Tensor<1> {
        cross_entropy(self.logits_of(x), batch.labels.clone())
    }

    fn counted(batch: &ImageBatch) -> u64 {
        batch.rows() as u64
    }

    fn visit_segment<V: ModuleVisitor>(&self, segment: Segment, visitor: &mut V) {
        let tower = &self.vision_model;
        match segment {
            Segment::Entry => {
                tower.embeddings.visit(visitor);
                tower.pre_layrnorm.visit(visitor);
            }
            Segment::Block(number) => tower.encoder.layers[number].visit(visitor),
            Segment::Head => {
                tower.post_layernorm.visit(visitor);
                self.classifier.visit(visitor);
            }
        }
    }
}

impl Clip {
    /// A model with random weights that depend on the seed alone.
    pub fn random(config: &ClipConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        Self::build(config, &mut RandomWeights { seed, std: config.vision.encoder.initializer_range }, device)
    }

    /// A model whose weights come from `source`. On an autodiff device every parameter is trainable.
    pub fn build(config: &ClipConfig, source: &mut dyn WeightSource, device: &Device) -> Result<Self, ModelError> {
        config.validate()?;
        let mut builder = Builder::new(source, device);
        let (vision, text, out) = (&config.vision, &config.text, config.vision.projection_dim);
        Ok(Self {
            text_model: ClipTextTower::build(&mut builder, text)?,
            vision_model: ClipVisionTower::build(&mut builder, vision)?,
            visual_projection: dense(&mut builder, "visual_projection", [vision.encoder.hidden_size, out], false)?,
            text_projection: dense(&mut builder, "text_projection", [text.encoder.hidden_size, out], false)?,
            logit_scale: builder.scalar("logit_scale", Init::Constant(config.logit_scale_init_value as f32))?,
            config: config.clone(),
        })
    }

    /// The configuration the model was built from.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// Attaches an adapter to the matching linear layers and freezes everything else.
    pub fn attach(self, attach: Attach) -> Result<(Self, Report), AdapterError> {
        attach.factored().to(self)
    }

    /// Embeddings `[batch, projection_dim]` of length 1 of pixels `[batch, num_channels, image_size, image_size]`.
    pub fn image_embeds(&self, pixels: Tensor<4>) -> Tensor<2> {
        let tower = &self.vision_model;
        unit(self.visual_projection.forward(tower.pooled(tower.hidden(pixels))))
    }

    /// Embeddings `[batch, projection_dim]` of length 1 of texts; `mask` as in [`ClipTextTower::pooled`].
    pub fn text_embeds(&self, texts: &[Vec<i32>], mask: Option<&[Vec<i32>]>) -> Result<Tensor<2>, ModelError> {
        Ok(unit(self.text_projection.forward(self.text_model.pooled(texts, mask)?)))
    }

    /// Logits `[images, texts]`: the cosines of the embeddings times `exp(logit_scale)`.
    pub fn logits_per_image(&self, images: Tensor<2>, texts: Tensor<2>) -> Tensor<2> {
        images.matmul(texts.transpose()) * self.logit_scale.val().exp().unsqueeze()
    }

    /// Mean of the cross-entropies of images and of texts, shape `[1]`, from logits `[pairs, pairs]`.
    pub fn contrastive_loss(logits: Tensor<2>) -> Tensor<1> {
        let [pairs, _] = logits.dims();
        let own = || Tensor::<1, Int>::arange(0..pairs as i64, &logits.device().inner());
        let both = cross_entropy(logits.clone(), own()) + cross_entropy(logits.clone().transpose(), own());
        both / (2 * pairs) as f64
    }
}

/// Rows of length 1.
fn unit(rows: Tensor<2>) -> Tensor<2> {
    let length = rows.clone().square().sum_dim(1).sqrt();
    rows / length
}
