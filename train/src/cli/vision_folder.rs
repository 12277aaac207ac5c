//! Vision models of the commands: their folders, adapters on them, and the preparation of their images.

use std::path::Path;

use burn::tensor::Device;
use lowrank_models::hub::peft::PeftFolder;
use lowrank_models::hub::{FileType, FileTypes, VisionFolder, VisionModel, VisionShape};
use lowrank_models::vit::{Clip, ClipVision};
use lowrank_models::{ClipClassifier, VisionTransformer, hub};

use super::folder::whole;
use super::on_model::Adapters;
use crate::build::BuildError;
use crate::data::DataError;
use crate::data::images::ImageSettings;
use crate::recipe::adapter_labels;

/// A model folder of images with its preparation.
pub struct VisionOf<'a> {
    /// The folder.
    pub dir: &'a Path,
    /// Its configuration.
    pub folder: VisionFolder,
    /// Preparation of the images.
    pub settings: ImageSettings,
}

impl<'a> VisionOf<'a> {
    /// Opens a folder; warns of settings that are not followed in training.
    pub fn open(dir: &'a Path) -> Result<Self, BuildError> {
        let folder = VisionFolder::open(dir)?;
        let settings = ImageSettings::read(dir).map_err(DataError::from)?;
        Ok(Self { dir, folder, settings })
    }

    /// Loads the model with adapters, for the classes of the last adapter that brings a classifier.
    pub fn load(&self, adapters: &Adapters, device: &Device) -> Result<VisionModel, BuildError> {
        let mut labels = None;
        for dir in adapters.paths() {
            labels = adapter_labels(dir)?.or(labels);
        }
        let model = match (labels, &self.folder.config.shape) {
            (None, _) => self.folder.load(device)?,
            (Some(labels), VisionShape::Vit(_)) => {
                VisionModel::Vit(Box::new(self.folder.load_vit(&labels, 0, device)?))
            }
            (Some(labels), _) => {
                VisionModel::ClipClassifier(Box::new(self.folder.load_clip_classifier(&labels, 0, device)?))
            }
        };
        Ok(match model {
            VisionModel::Vit(model) => {
                let attach = |folder: PeftFolder, model| Ok(folder.attach_by(model, VisionTransformer::attach)?.0);
                VisionModel::Vit(Box::new(adapters.on_by(*model, attach)?))
            }
            VisionModel::ClipVision(model) => {
                let attach = |folder: PeftFolder, model| Ok(folder.attach_by(model, ClipVision::attach)?.0);
                VisionModel::ClipVision(Box::new(adapters.on_by(*model, attach)?))
            }
            VisionModel::ClipClassifier(model) => {
                let attach = |folder: PeftFolder, model| Ok(folder.attach_by(model, ClipClassifier::attach)?.0);
                VisionModel::ClipClassifier(Box::new(adapters.on_by(*model, attach)?))
            }
            VisionModel::Clip(model) => {
                let attach = |folder: PeftFolder, model| Ok(folder.attach_by(model, Clip::attach)?.0);
                VisionModel::Clip(Box::new(adapters.on_by(*model, attach)?))
            }
        })
    }

    /// Writes a model of this kind as a new folder. Weights have this type, or the types that they have in the folder it comes from.
    pub fn write(&self, model: &VisionModel, dtype: Option<FileType>, out: &Path) -> anyhow::Result<()> {
        let types = match dtype {
            Some(dtype) => FileTypes::all(dtype),
            None => self.folder.types().map_err(BuildError::from)?,
        };
        whole(out, |dir| {
            let extra = &self.folder.config.extra;
            hub::save_vision(model, extra, &types, dir, hub::MAX_SHARD_BYTES).map_err(BuildError::from)?;
            Ok(hub::copy_companions(self.dir, dir).map_err(BuildError::from)?)
        })
    }
}
