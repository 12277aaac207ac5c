//! The vision transformer with a classifier.
//!
//! "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (arXiv 2010.11929). Fields carry the names of Hugging Face's
//! implementation; [`vit_file_name`](crate::hub::vit_file_name) gives those of its files, which are older.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor, activation};

use super::config::VitConfig;
use super::encoder::{LayerNorm, Sight, VitBlock, dense};
use super::patches::{PatchProjection, with_class_token};
use crate::error::ModelError;
use crate::linear::Dense;
use crate::segments::{Rows, Segment, SegmentedModel};
use crate::weights::{Builder, Init, RandomWeights, WeightSource};
use lowrank_adapters::{AdapterError, AdapterStack, Attach, Report};

/// A batch of images with their classes.
#[derive(Clone, Debug)]
pub struct ImageBatch {
    /// Pixels `[batch, num_channels, image_size, image_size]`, normalised as the model expects.
    pub pixels: Tensor<4>,
    /// Class of each image `[batch]`.
    pub labels: Tensor<1, Int>,
}

impl Rows for ImageBatch {
    fn rows(&self) -> usize {
        self.pixels.dims()[0]
    }

    fn narrow(&self, start: usize, count: usize) -> Self {
        Self {
            pixels: self.pixels.clone().narrow(0, start, count),
            labels: self.labels.clone().narrow(0, start, count),
        }
    }
}

/// A model that tells the classes of images.
pub trait ImageClassifier: SegmentedModel<Batch = ImageBatch> {
    /// Logits `[batch, labels]` of pixels `[batch, num_channels, image_size, image_size]`.
    fn logits(&self, pixels: Tensor<4>) -> Tensor<2>;

    /// The same model with a trained classifier, whatever else is frozen; one that carries an adapter stays as it is.
    fn with_trained_classifier(self) -> Self;
}

/// A classifier that is trained, whatever else is frozen; one that carries an adapter stays as it is.
pub(super) fn trained(classifier: Dense) -> Dense {
    match classifier.weight.reparameterization::<AdapterStack>() {
        Some(_) => classifier,
        None => {
            let Dense { weight, bias } = classifier;
            let bias = bias.map(|bias| bias.set_require_grad(true));
            Dense { weight: weight.set_require_grad(true), bias }
        }
    }
}

/// Patches of images.
#[derive(Module, Debug)]
pub struct VitPatches {
    /// Linear map of the patches.
    pub projection: PatchProjection,
}

/// Class token, patches and positions.
#[derive(Module, Debug)]
pub struct VitEmbeddings {
    /// Class token `[1, 1, hidden_size]`.
    pub cls_token: Param<Tensor<3>>,
    /// Patches.
    pub patch_embeddings: VitPatches,
    /// Positions `[1, patches + 1, hidden_size]`.
    pub position_embeddings: Param<Tensor<3>>,
}

/// Everything but the classifier.
#[derive(Module, Debug)]
pub struct VitBody {
    /// Input of the encoder.
    pub embeddings: VitEmbeddings,
    /// Blocks, first to last.
    pub layers: Vec<VitBlock>,
    /// Norm before the classifier.
    pub layernorm: LayerNorm,
}

/// A vision transformer that classifies images.
#[derive(Module, Debug)]
pub struct VisionTransformer {
    /// Encoder with its input and its last norm.
    pub vit: VitBody,
    /// Classifier `[hidden_size, labels]`.
    pub classifier: Dense,
    #[module(skip)]
    config: VitConfig,
}

impl VisionTransformer {
    /// A model with random weights that depend on the seed alone.
    pub fn random(config: &VitConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let std = config.encoder.initializer_range;
        Self::build(config, &mut RandomWeights { seed, std }, device)
    }

    /// A model whose weights come from `source`, under the paths of the module. On an autodiff device every parameter is trainable.
    pub fn build(config: &VitConfig, source: &mut dyn WeightSource, device: &Device) -> Result<Self, ModelError> {
        config.validate()?;
        let mut builder = Builder::new(source, device);
        let (encoder, hidden) = (&config.encoder, config.encoder.hidden_size);
        let (token, places) = ([1, 1, hidden], [1, config.positions(), hidden]);
        let embeddings = VitEmbeddings {
            cls_token: builder.tensor("vit.embeddings.cls_token", token, Init::Standard)?,
            patch_embeddings: VitPatches {
                projection: PatchProjection::build(
                    &mut builder,
                    "vit.embeddings.patch_embeddings.projection",
                    &config.image,
                    hidden,
                    true,
                )?,
            },
            position_embeddings: builder.tensor("vit.embeddings.position_embeddings", places, Init::Standard)?,
        };
        let layers = (0..encoder.num_hidden_layers)
            .map(|layer| VitBlock::build(&mut builder, &format!("vit.layers.{layer}"), encoder, config.qkv_bias))
            .collect::<Result<_, _>>()?;
        let layernorm = LayerNorm::build(&mut builder, "vit.layernorm", encoder)?;
        let classifier = dense(&mut builder, "classifier", [hidden, config.labels.len()], true)?;
        Ok(Self { vit: VitBody { embeddings, layers, layernorm }, classifier, config: config.clone() })
    }

    /// The configuration the model was built from.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Attaches an adapter to the matching linear layers and freezes everything else.
    pub fn attach(self, attach: Attach) -> Result<(Self, Report), AdapterError> {
        attach.factored().to(self)
    }

    /// Output of the last block for pixels `[batch, num_channels, image_size, image_size]`.
    pub fn hidden(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.vit.layers.iter().fold(self.entered(pixels), |x, block| block.forward(x, &Sight::all()))
    }

    /// Class token `[batch, hidden_size]` after the last norm, from the output of the last block.
    pub fn pooled(&self, hidden: Tensor<3>) -> Tensor<2> {
        let [batch, _, width] = hidden.dims();
        self.vit.layernorm.forward(hidden.slice([0..batch, 0..1])).reshape([batch, width])
    }

    /// Logits `[batch, labels]` from the output of the last block.
    pub fn logits_of(&self, hidden: Tensor<3>) -> Tensor<2> {
        self.classifier.forward(self.pooled(hidden))
    }

    fn entered(&self, pixels: Tensor<4>) -> Tensor<3> {
        let embeddings = &self.vit.embeddings;
        let patches = embeddings.patch_embeddings.projection.forward(pixels);
        with_class_token(embeddings.cls_token.val(), patches, embeddings.position_embeddings.val())
    }
}

/// Sum of the cross-entropies in nats of logits `[rows, classes]` and targets `[rows]`, shape `[1]`.
pub(super) fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    activation::log_softmax(logits, 1).gather(1, targets.unsqueeze_dim(1)).sum().neg()
}

impl ImageClassifier for VisionTransformer {
    fn logits(&self, pixels: Tensor<4>) -> Tensor<2> {
        self.logits_of(self.hidden(pixels))
    }

    fn with_trained_classifier(mut self) -> Self {
        self.classifier = trained(self.classifier);
        self
    }
}

impl SegmentedModel for VisionTransformer {
    type Batch = ImageBatch;
    type Hidden = Tensor<3>;
    type Context = ();

    fn context(&self, _: &ImageBatch) {}

    fn enter(&self, batch: &ImageBatch, _: &()) -> Tensor<3> {
        self.entered(batch.pixels.clone())
    }

    fn blocks(&self) -> usize {
        self.vit.layers.len()
    }

    fn block(&self, number: usize, x: Tensor<3>, _: &()) -> Tensor<3> {
        self.vit.layers[number].forward(x, &Sight::all())
    }

    fn loss(&self, x: Tensor<3>, batch: &ImageBatch) -> Tensor<1> {
        cross_entropy(self.logits_of(x), batch.labels.clone())
    }

    fn counted(batch: &ImageBatch) -> u64 {
        batch.rows() as u64
    }

    fn visit_segment<V: ModuleVisitor>(&self, segment: Segment, visitor: &mut V) {
        match segment {
            Segment::Entry => self.vit.embeddings.visit(visitor),
            Segment::Block(number) => self.vit.layers[number].visit(visitor),
            Segment::Head => {
                self.vit.layernorm.visit(visitor);
                self.classifier.visit(visitor);
            }
        }
    }
}
