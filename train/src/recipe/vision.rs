//! Classifiers of images as the model of a run.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use lowrank_models::adapter::{AdapterError, Attach, Report};
use lowrank_models::hub::{
    FileType, FileTypes, MAX_SHARD_BYTES, VisionFolder, VisionModel, copy_companions, save_vision,
};
use lowrank_models::{
    ClassifierConfig, ClipClassifier, ClipClassifierConfig, ImageBatch, ImageClassifier, MatrixStorage, ModelError,
    Parameterization, VisionTransformer, VitConfig,
};
use serde_json::{Map, Value, json};

use super::llama::other_shape;
use super::stage::searched;
use crate::build::{Architecture, BuildError, Scores, StageData, vit_config};
use crate::config::{Config, Job, ModelSection};
use crate::data::images::{ImageSet, ImageSettings, PREPROCESSOR};
use crate::engine::TrainError;
use crate::objective::{Classified, ImageStream, Stream, grid};

/// Configuration of a classifier and its images.
#[derive(Clone, Debug)]
pub struct ImageHub<C> {
    /// Shape, constants and classes.
    pub config: C,
    /// Further keys of `config.json`.
    pub extra: Map<String, Value>,
    /// Preparation of the images.
    pub settings: ImageSettings,
}

/// A classifier of images that a run can train.
pub trait ImageModel: ImageClassifier + 'static {
    /// Shape, constants and classes.
    type Config: ClassifierConfig + 'static;

    /// Shape of the model in a folder; without classes if it has no classifier.
    fn of_folder(folder: &VisionFolder) -> Result<Self::Config, ModelError>;

    /// Shape that a section names, for these classes.
    fn named(section: &ModelSection, labels: Vec<String>) -> Result<Self::Config, BuildError>;

    /// Creates a model with random weights.
    fn drawn(config: &Self::Config, seed: u64, device: &Device) -> Result<Self, ModelError>;

    /// Loads a folder for these classes. If they are not its own, a new classifier is drawn from the seed.
    fn loaded(folder: &VisionFolder, labels: &[String], seed: u64, device: &Device) -> Result<Self, ModelError>;

    /// The same as one of the models that folders hold.
    fn into_model(self) -> VisionModel;
}

impl ImageModel for VisionTransformer {
    type Config = VitConfig;

    fn of_folder(folder: &VisionFolder) -> Result<VitConfig, ModelError> {
        folder.vit().cloned()
    }

    fn named(section: &ModelSection, labels: Vec<String>) -> Result<VitConfig, BuildError> {
        vit_config(section, labels)
    }

    fn drawn(config: &VitConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        Self::random(config, seed, device)
    }

    fn loaded(folder: &VisionFolder, labels: &[String], seed: u64, device: &Device) -> Result<Self, ModelError> {
        folder.load_vit(labels, seed, device)
    }

    fn into_model(self) -> VisionModel {
        VisionModel::Vit(Box::new(self))
    }
}

impl ImageModel for ClipClassifier {
    type Config = ClipClassifierConfig;

    fn of_folder(folder: &VisionFolder) -> Result<ClipClassifierConfig, ModelError> {
        folder.clip_classifier()
    }

    fn named(section: &ModelSection, _: Vec<String>) -> Result<ClipClassifierConfig, BuildError> {
        let reason = format!("model.name = {}: a CLIP has no named shapes; give its folder", section.name);
        Err(BuildError::Settings(reason))
    }

    fn drawn(config: &ClipClassifierConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        Self::random(config, seed, device)
    }

    fn loaded(folder: &VisionFolder, labels: &[String], seed: u64, device: &Device) -> Result<Self, ModelError> {
        folder.load_clip_classifier(labels, seed, device)
    }

    fn into_model(self) -> VisionModel {
        VisionModel::ClipClassifier(Box::new(self))
    }
}

/// Images of a stage.
#[derive(Clone)]
pub struct ImageData {
    /// Training images.
    pub train: ImageStream,
    /// Held-out images.
    pub validation: ImageStream,
    /// Preparation of both.
    pub settings: ImageSettings,
    pub(super) fingerprint: String,
    pub(super) held_out_fingerprint: String,
    pub(super) description: String,
    pub(super) ask: String,
}

impl StageData<ImageBatch> for ImageData {
    fn train(&self) -> &dyn Stream<ImageBatch> {
        &self.train
    }

    fn validation(&self) -> &dyn Stream<ImageBatch> {
        &self.validation
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn held_out_fingerprint(&self) -> &str {
        &self.held_out_fingerprint
    }

    fn unit(&self) -> &'static str {
        "images"
    }

    fn of_all(&self) -> &'static str {
        "images"
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn ask(&self) -> &str {
        &self.ask
    }
}

/// Name of the file with the classes of an adapter, beside its own files.
pub const LABELS: &str = "labels.json";
/// Pictures of held-out images in the logs.
const SHOWN: usize = 32;

/// The classes of an adapter folder, if it states them.
pub fn adapter_labels(dir: &Path) -> Result<Option<Vec<String>>, BuildError> {
    let path = dir.join(LABELS);
    if !path.exists() {
        return Ok(None);
    }
    let bad = |reason: String| BuildError::Model(ModelError::File { path: path.clone(), reason });
    let text = std::fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
    let labels: Vec<String> = serde_json::from_str(&text).map_err(|error| bad(format!("no list of names: {error}")))?;
    if labels.is_empty() { Err(bad("has no class".into())) } else { Ok(Some(labels)) }
}

impl<M: ImageModel> Architecture for M {
    type Hub = ImageHub<M::Config>;
    type Data = ImageData;

    fn random(hub: &Self::Hub, seed: u64, _: MatrixStorage, device: &Device) -> Result<Self, BuildError> {
        Ok(Self::drawn(&hub.config, seed, device)?)
    }

    fn load(hub: &Self::Hub, folder: &Path, seed: u64, _: MatrixStorage, device: &Device) -> Result<Self, BuildError> {
        Ok(Self::loaded(&VisionFolder::open(folder)?, hub.config.labels(), seed, device)?)
    }

    fn load_saved(hub: &Self::Hub, dir: &Path, _: MatrixStorage, device: &Device) -> Result<Self, BuildError> {
        let folder = VisionFolder::open(dir)?;
        match Self::of_folder(&folder)? == hub.config {
            true => Ok(Self::loaded(&folder, hub.config.labels(), 0, device)?),
            false => Err(other_shape()),
        }
    }

    fn save(&self, hub: &Self::Hub, _: Option<&Path>, _: Option<FileType>, dir: &Path) -> Result<(), BuildError> {
        let model = self.clone().into_model();
        Ok(save_vision(&model, &hub.extra, &FileTypes::default(), dir, MAX_SHARD_BYTES)?)
    }

    fn save_beside_adapter(hub: &Self::Hub, dir: &Path) -> Result<(), BuildError> {
        write(&dir.join(LABELS), &format!("{:#}\n", json!(hub.config.labels())))
    }

    fn save_companions(data: &ImageData, folder: Option<&Path>, _: Job, dir: &Path) -> Result<(), BuildError> {
        if let Some(folder) = folder {
            return Ok(copy_companions(folder, dir)?);
        }
        write(&dir.join(PREPROCESSOR), &data.settings.to_json())
    }

    fn attach(self, attach: Attach) -> Result<(Self, Report), AdapterError> {
        attach.factored().to(self)
    }

    fn with_trained_head(self) -> Self {
        self.with_trained_classifier()
    }

    fn is_head(name: &str) -> bool {
        name.starts_with("classifier.")
    }

    fn parameterization(_: &Self::Hub) -> Parameterization {
        Parameterization::default()
    }

    fn block_shapes(hub: &Self::Hub) -> Vec<[usize; 2]> {
        hub.config.encoder().block_shapes().to_vec()
    }

    fn sample(&self, _: &ImageData, _: &Config) -> Result<Option<String>, TrainError> {
        Ok(None)
    }

    fn scores(&self, data: &ImageData, starts: Option<&[u64]>, device: &Device) -> Result<Scores, TrainError> {
        let found = Classified::of(self, &data.validation, starts, device, |_| ())?;
        let set = data.validation.set();
        let shown = (0..set.len().min(SHOWN)).map(|number| set.picture(number)).collect::<Result<Vec<_>, _>>()?;
        let images = grid(&shown).map(|picture| ("validation/images", picture));
        let pictures = images.into_iter().chain([("validation/confusion", found.picture())]);
        Ok(Scores { accuracy: Some(found.accuracy()), pictures: pictures.collect() })
    }
}

fn write(path: &Path, text: &str) -> Result<(), BuildError> {
    let error = |source| BuildError::Model(ModelError::Io { path: path.to_path_buf(), source });
    std::fs::write(path, text).map_err(error)
}

impl ImageData {
    /// Images in the order of training, with their random changes.
    fn stream(set: ImageSet, config: &Config) -> Result<ImageStream, BuildError> {
        let stream = ImageStream::new(Arc::new(set), config.train.batch);
        let stream = stream.shuffled(crate::build::augment(config), config.train.seed);
        match config.data.images.balance_domains {
            true => stream.balanced().map_err(BuildError::Settings),
            false => Ok(stream),
        }
    }

    /// Training images in two parts: those of the steps of a search, and the fraction that it searches with.
    pub(super) fn parts(&self, config: &Config, fraction: f64) -> Result<[ImageStream; 2], BuildError> {
        let set = self.train.set();
        let (learned, searched) = set.drawn(searched(fraction, set.len())?, config.train.seed);
        Ok([Self::stream(learned, config)?, Self::stream(searched, config)?])
    }

    /// Training and held-out images with their random changes.
    pub(super) fn new(train: ImageSet, validation: ImageSet, config: &Config, ask: String) -> Result<Self, BuildError> {
        let batch = config.train.batch;
        let count = |count: usize| crate::config::count(count as u64);
        let mut description = format!(
            "{} images of {} classes to learn from, {} held out",
            count(train.len()),
            count(train.labels.len()),
            count(validation.len())
        );
        let skipped = train.skipped + validation.skipped;
        if skipped > 0 {
            description.push_str(&format!("; {} broken ones left out", count(skipped)));
        }
        let settings = train.settings().clone();
        let (fingerprint, held_out_fingerprint) = (train.fingerprint(), validation.fingerprint());
        Ok(Self {
            fingerprint,
            held_out_fingerprint,
            train: Self::stream(train, config)?,
            validation: ImageStream::new(Arc::new(validation), batch),
            settings,
            description,
            ask,
        })
    }
}
