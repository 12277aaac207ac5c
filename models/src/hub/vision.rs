//! Folders of vision transformers and CLIP.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde_json::{Map, Value};

use super::file_type::FileTypes;
use super::names::CONFIG;
use super::tensor_files::TensorFiles;
use super::vision_config::{VisionHub, VisionShape};
use super::vision_names::vit_file_name;
use super::write::{Names, save_weights, write_text};
use crate::error::ModelError;
use crate::vit::{
    ClassifierConfig, Clip, ClipClassifier, ClipClassifierConfig, ClipConfig, ClipVision, VisionTransformer, VitConfig,
};
use crate::weights::{Choose, Init, Layout, RandomWeights, WeightSource};

/// A model folder of a vision transformer or CLIP whose configuration has been read.
#[derive(Clone, Debug)]
pub struct VisionFolder {
    dir: PathBuf,
    /// Content of `config.json`.
    pub config: VisionHub,
}

/// A model of such a folder.
#[derive(Clone, Debug)]
pub enum VisionModel {
    /// A vision transformer with a classifier.
    Vit(Box<VisionTransformer>),
    /// CLIP's vision tower.
    ClipVision(Box<ClipVision>),
    /// Both towers of CLIP.
    Clip(Box<Clip>),
    /// CLIP's vision tower with a classifier.
    ClipClassifier(Box<ClipClassifier>),
}

impl VisionFolder {
    /// Returns true if a folder holds one of these models, as its `config.json` says.
    pub fn is_one(dir: &Path) -> Result<bool, ModelError> {
        let path = dir.join(CONFIG);
        Ok(path.exists() && VisionHub::is_one(&path)?)
    }

    /// Reads the configuration; the weights wait for [`VisionFolder::load`].
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        if !dir.join(CONFIG).exists() {
            let reason = format!("has no {CONFIG}; name the folder of a model");
            return Err(ModelError::File { path: dir.to_path_buf(), reason });
        }
        Ok(Self { dir: dir.to_path_buf(), config: VisionHub::read(&dir.join(CONFIG))? })
    }

    /// Loads the model in f32. A tensor that is missing, left over or of another shape is rejected.
    pub fn load(&self, device: &Device) -> Result<VisionModel, ModelError> {
        let mut files = self.files()?;
        let model = match &self.config.shape {
            VisionShape::Vit(config) => {
                let mut source = VitFiles { files: &mut files, head: None };
                VisionModel::Vit(Box::new(VisionTransformer::build(config, &mut source, device)?))
            }
            VisionShape::ClipVision(config) => {
                VisionModel::ClipVision(Box::new(ClipVision::build(config, &mut files, device)?))
            }
            VisionShape::Clip(config) => VisionModel::Clip(Box::new(Clip::build(config, &mut files, device)?)),
            VisionShape::ClipClassifier(config) => {
                VisionModel::ClipClassifier(Box::new(ClipClassifier::build(config, &mut files, device)?))
            }
        };
        files.finish()?;
        Ok(model)
    }

    /// The shape of a vision transformer; folders of CLIP are rejected.
    pub fn vit(&self) -> Result<&VitConfig, ModelError> {
        match &self.config.shape {
            VisionShape::Vit(config) => Ok(config),
            _ => Err(ModelError::File {
                path: self.dir.join(CONFIG),
                reason: "is of a CLIP; give the folder of a ViTForImageClassification".into(),
            }),
        }
    }

    /// The shape of a CLIP as a classifier of images; it has no classes if the folder has no classifier. Folders of vision transformers are
    /// rejected.
    pub fn clip_classifier(&self) -> Result<ClipClassifierConfig, ModelError> {
        let bare = |clip: ClipConfig| ClipClassifierConfig { clip, labels: Vec::new() };
        match &self.config.shape {
            VisionShape::ClipClassifier(config) => Ok(config.clone()),
            VisionShape::Clip(config) => Ok(bare(config.clone())),
            VisionShape::ClipVision(config) => Ok(bare(ClipConfig::of_vision(config.clone()))),
            VisionShape::Vit(_) => Err(ModelError::File {
                path: self.dir.join(CONFIG),
                reason: "is of a vision transformer; give the folder of a CLIP".into(),
            }),
        }
    }

    /// Loads a vision transformer for these classes. If they are not its own, its classifier is left out, and a new one is drawn from the seed.
    pub fn load_vit(&self, labels: &[String], seed: u64, device: &Device) -> Result<VisionTransformer, ModelError> {
        let own = self.vit()?;
        let std = own.encoder.initializer_range;
        let (mut files, head) = self.files_and_head(own.labels == labels, RandomWeights { seed, std })?;
        let config = own.clone().with_labels(labels.to_vec());
        let model = VisionTransformer::build(&config, &mut VitFiles { files: &mut files, head }, device)?;
        files.finish()?;
        Ok(model)
    }

    /// Loads the vision tower of a CLIP as a classifier of these classes. If they are not its own, a new classifier is drawn from the seed, as
    /// `transformers` draws it.
    pub fn load_clip_classifier(
        &self,
        labels: &[String],
        seed: u64,
        device: &Device,
    ) -> Result<ClipClassifier, ModelError> {
        let own = self.clip_classifier()?;
        let std = (own.encoder().hidden_size as f64).powf(-0.5);
        let (mut files, head) = self.files_and_head(own.labels == labels, RandomWeights { seed, std })?;
        files.ignore(|name| BESIDE_THE_TOWER.iter().any(|part| name.starts_with(part)));
        let config = own.with_labels(labels.to_vec());
        let model = ClipClassifier::build(&config, &mut VitFiles { files: &mut files, head }, device)?;
        files.finish()?;
        Ok(model)
    }

    /// The files, and the source of a new classifier if that in the files is not of use and therefore left out.
    fn files_and_head(
        &self,
        of_use: bool,
        drawn: RandomWeights,
    ) -> Result<(TensorFiles, Option<RandomWeights>), ModelError> {
        let mut files = self.files()?;
        if of_use {
            return Ok((files, None));
        }
        files.ignore(|name| name.starts_with(HEAD));
        Ok((files, Some(drawn)))
    }

    /// Types of the weights in the files.
    pub fn types(&self) -> Result<FileTypes, ModelError> {
        Ok(self.files()?.types())
    }

    fn files(&self) -> Result<TensorFiles, ModelError> {
        let mut files = TensorFiles::open(&self.dir)?;
        // Buffers of older versions, which count from 0.
        files.ignore(|name| name.ends_with(".embeddings.position_ids"));
        Ok(files)
    }
}

/// Beginning of the names of the classifier.
const HEAD: &str = "classifier.";

/// Beginnings of the names of what CLIP has besides its vision tower.
const BESIDE_THE_TOWER: [&str; 4] = ["text_model.", "text_projection.", "visual_projection.", "logit_scale"];

/// The tensors of a vision transformer under the names of its module.
struct VitFiles<'a> {
    files: &'a mut TensorFiles,
    /// Source of a new classifier.
    head: Option<RandomWeights>,
}

impl VitFiles<'_> {
    /// The name in the file: files of newer versions have the names of the module.
    fn name(&self, path: &str) -> String {
        match self.files.has(path) {
            true => path.to_string(),
            false => vit_file_name(path),
        }
    }

    fn drawn(&mut self, path: &str) -> Option<&mut RandomWeights> {
        self.head.as_mut().filter(|_| path.starts_with(HEAD))
    }
}

impl WeightSource for VitFiles<'_> {
    fn matrix(&mut self, path: &str, shape: [usize; 2], layout: Layout, init: Init) -> Result<Vec<f32>, ModelError> {
        match self.drawn(path) {
            Some(random) => random.matrix(path, shape, layout, init),
            None => self.files.matrix(&self.name(path), shape, layout, init),
        }
    }

    fn vector(&mut self, path: &str, len: usize, init: Init) -> Result<Vec<f32>, ModelError> {
        match self.drawn(path) {
            Some(random) => random.vector(path, len, init),
            None => self.files.vector(&self.name(path), len, init),
        }
    }

    fn tensor(&mut self, path: &str, shape: &[usize], init: Init) -> Result<Vec<f32>, ModelError> {
        self.files.tensor(&self.name(path), shape, init)
    }

    fn positions(&mut self, path: &str, _: usize, _: usize, _: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        Err(ModelError::Config(format!("{path}: a vision transformer has no positions")))
    }
}

impl VisionModel {
    fn shape(&self) -> VisionShape {
        match self {
            Self::Vit(model) => VisionShape::Vit(model.config().clone()),
            Self::ClipVision(model) => VisionShape::ClipVision(model.config().clone()),
            Self::Clip(model) => VisionShape::Clip(model.config().clone()),
            Self::ClipClassifier(model) => VisionShape::ClipClassifier(model.config().clone()),
        }
    }
}

/// Writes `config.json` and the weights, each in its type, into an existing folder, under the names that all versions of `transformers` read; see
/// [`save_as`](super::save_as).
pub fn save_vision(
    model: &VisionModel,
    extra: &Map<String, Value>,
    types: &FileTypes,
    dir: &Path,
    max_shard_bytes: u64,
) -> Result<(), ModelError> {
    match model {
        VisionModel::Vit(model) => {
            let names = Names { of: vit_file_name, ..Names::default() };
            save_weights(&**model, &names, types, dir, max_shard_bytes)?;
        }
        VisionModel::ClipVision(model) => save_weights(&**model, &Names::default(), types, dir, max_shard_bytes)?,
        VisionModel::ClipClassifier(model) => save_weights(&**model, &Names::default(), types, dir, max_shard_bytes)?,
        VisionModel::Clip(model) => {
            let names = Names { scalars: &["logit_scale"], ..Names::default() };
            save_weights(&**model, &names, types, dir, max_shard_bytes)?;
        }
    }
    let hub = VisionHub { shape: model.shape(), extra: extra.clone(), warnings: Vec::new() };
    write_text(&dir.join(CONFIG), &hub.to_json(types.usual()))
}
