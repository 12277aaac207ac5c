//! Vision transformers of a configuration.

use std::path::Path;

use lowrank_models::VitConfig;
use lowrank_models::hub::{FileType, VisionFolder, VisionShape};

use super::{BuildError, model_folder};
use crate::config::{Config, DataSection, ModelSection, TokenizerSection, WeightsSection};
use crate::data::images::Augment;

/// Returns true if the section names a vision transformer: one of its shapes, or a folder.
pub fn is_vision(model: &ModelSection) -> Result<bool, BuildError> {
    let named = VitConfig::names().any(|name| name == model.name);
    Ok(named || !model.name.is_empty() && VisionFolder::is_one(Path::new(&model.name))?)
}

/// Returns true if the section, which names a model of images, names the folder of a CLIP.
pub fn is_clip(model: &ModelSection) -> Result<bool, BuildError> {
    Ok(match model_folder(model) {
        Some(folder) => !matches!(VisionFolder::open(folder)?.config.shape, VisionShape::Vit(_)),
        None => false,
    })
}

/// Shape of a new vision transformer for images of these classes.
pub fn vit_config(model: &ModelSection, labels: Vec<String>) -> Result<VitConfig, BuildError> {
    let mut config = VitConfig::named(&model.name, labels)?;
    macro_rules! take {
        ($($field:ident),*) => {$( if let Some(value) = model.$field { config.encoder.$field = value; } )*};
    }
    take!(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads);
    config.validate()?;
    Ok(config)
}

/// Random changes of training images.
pub fn augment(config: &Config) -> Augment {
    let section = &config.data.images;
    Augment { flip: section.flip, crop: section.crop, rotate: section.rotate }
}

/// Rejects settings that images or vision transformers do not have.
pub fn check_vision(config: &Config, folder: Option<&Path>) -> Result<(), BuildError> {
    let (model, data, usual) = (&config.model, &config.data, DataSection::default());
    let (shape, none) = (ModelSection { name: String::new(), ..model.clone() }, ModelSection::default());
    let sizes = ModelSection {
        hidden_size: None,
        intermediate_size: None,
        num_hidden_layers: None,
        num_attention_heads: None,
        ..shape.clone()
    };
    let wrong = [
        ("data.field", data.field != usual.field),
        ("data.format", data.format != usual.format),
        ("data.document_mask", data.document_mask != usual.document_mask),
        ("data.learn_prompt", data.learn_prompt != usual.learn_prompt),
        ("data.packing", data.packing != usual.packing),
        ("data.too_long", data.too_long != usual.too_long),
        ("tokenizer", config.tokenizer != TokenizerSection::default()),
        // Checkpoints hold f32, from which training goes on with the same bits.
        ("checkpoint.dtype", config.checkpoint.dtype.is_some_and(|dtype| dtype != FileType::F32)),
        ("train.tokens", config.train.tokens > 0),
        ("model.parameterization.name", !["", "dense"].contains(&model.parameterization.name.as_str())),
        ("model.* (other keys than those of width, depth and heads)", sizes != none),
        ("model.* (a folder has a shape of its own)", folder.is_some() && shape != none),
        ("weights", config.weights != WeightsSection::default()),
        // The planner knows what the operations of LLaMA keep.
        ("train.memory", !config.train.memory.is_empty()),
    ];
    match wrong.iter().find(|(_, wrong)| *wrong) {
        None => Ok(()),
        Some((key, _)) => Err(BuildError::Settings(format!(
            "{key}: not supported with a vision transformer, which model.name = {} is; remove it",
            model.name
        ))),
    }
}

/// Rejects settings of images for a model of texts.
pub fn check_text(config: &Config) -> Result<(), BuildError> {
    let usual = Config { data: DataSection::default(), ..config.clone() }.entries();
    let mut images = config.entries().into_iter().filter(|(key, _)| key.starts_with("data.images."));
    match images.find(|(key, value)| usual.get(key) != Some(value)) {
        None => Ok(()),
        Some((key, value)) => Err(BuildError::Settings(format!(
            "{key} = {value}: supported with a vision transformer alone, and model.name = {} is none; remove it, or give such a model",
            config.model.name
        ))),
    }
}
