//! Pretraining and fine-tuning of classifiers of images.

use std::path::{Path, PathBuf};

use lowrank_models::hub::VisionFolder;
use lowrank_models::{ClassifierConfig, MatrixStorage};
use serde_json::Map;

use super::memory::with_usual_rank;
use super::vision::{ImageData, ImageHub, ImageModel, adapter_labels};
use super::{Recipe, Stage, TrainedModel};
use crate::build::{BuildError, Listener, check_vision, model_folder, names_adapter_folder};
use crate::config::{Config, Job, bytes};
use crate::data::images::{ImageSet, ImageSettings};
use crate::objective::{SEARCH, Stream};
use crate::plan::Freedom;
use crate::process::machine_memory;

impl<M: ImageModel> Recipe<M> {
    /// Training of a classifier: one stage on images, or as many as the allocation has.
    pub fn images(mut config: Config, _: Freedom, listener: &mut dyn Listener) -> Result<Self, BuildError> {
        let folder = model_folder(&config.model).map(Path::to_path_buf);
        check_vision(&config, folder.as_deref())?;
        let own = folder.as_deref().map(VisionFolder::open).transpose()?;
        let settings = match &folder {
            Some(folder) => ImageSettings::read(folder).map_err(crate::data::DataError::from)?,
            None => ImageSettings::vit(M::named(&config.model, vec![String::new()])?.image().image_size),
        };
        let shape = own.as_ref().map(M::of_folder).transpose()?;
        let warnings = own.iter().flat_map(|own| &own.config.warnings);
        warnings.for_each(|warning| listener.warn(warning));
        let known = shape.as_ref().map(|shape| shape.labels().to_vec()).filter(|labels| !labels.is_empty());
        let begun = match names_adapter_folder(&config.adapter) && config.run.job == Job::Finetune {
            true => adapter_labels(Path::new(&config.adapter.name))?,
            false => None,
        };
        let (train, validation) = read(&config, &settings, begun.or(known), listener)?;
        let shape = match shape {
            Some(shape) => shape.with_labels(train.labels.clone()),
            None => M::named(&config.model, train.labels.clone())?,
        };
        let extra = own.map_or_else(Map::new, |own| own.config.extra);
        let hub = ImageHub { config: shape, extra, settings: settings.clone() };
        check_images(&hub)?;
        with_usual_rank(&mut config, hub.config.encoder().hidden_size, listener);
        let first = config.data.path.first().map(|path| path.display().to_string()).unwrap_or_default();
        let data = ImageData::new(train, validation, &config, format!("eval MODEL --data {first}"))?;
        let (job, steps) = (config.run.job, config.total_steps(data.train.rows()));
        let model = match (job, folder) {
            (Job::Finetune, None) => {
                return Err(BuildError::Settings(format!(
                    "model.name = {}: fine-tuning begins with the folder of a model; name one with --model DIR, or use pretrain",
                    config.model.name
                )));
            }
            (Job::Finetune, Some(folder)) => TrainedModel::fine_tuned(&config, hub, folder)?,
            (Job::Pretrain, folder) => TrainedModel::whole(hub, folder),
        };
        let allocation = model.allocation.as_deref();
        let parts = allocation.and_then(|allocation| allocation.search_fraction());
        let parts = parts.map(|fraction| data.parts(&config, fraction)).transpose()?;
        let mut stages: Vec<Stage<M>> = Stage::of_allocation(job.name(), data, allocation, steps)?;
        if let (Some([learned, searched]), Some(stage)) = (parts, stages.first_mut()) {
            stage.data.train = learned;
            stage.streams.push((SEARCH.into(), Box::new(searched)));
        }
        Ok(Self { config, model, stages, forecast: None })
    }
}

/// Training and held-out images. Classes are those of the model if it knows all of the training images', else those of the images.
fn read(
    config: &Config,
    settings: &ImageSettings,
    known: Option<Vec<String>>,
    listener: &mut dyn Listener,
) -> Result<(ImageSet, ImageSet), BuildError> {
    let section = &config.data;
    let skip = section.images.skip_broken;
    listener.begin("reading the images", 0);
    let mut train = ImageSet::read(&section.path, settings, None, skip)?.labelled()?;
    if let Some(known) = known {
        let new = train.labels.iter().find(|label| !known.contains(label)).cloned();
        match new {
            None => train = train.with_labels(&known),
            Some(label) => listener.line(&format!(
                "the images have other classes than the model, such as \"{label}\": a new classifier for {} is trained",
                train.labels.len()
            )),
        }
    }
    let others = |set: ImageSet| match section.images.leave_out.as_str() {
        "" => Ok(set),
        domain => set.without_domain(domain).map_err(BuildError::Settings),
    };
    train = others(train)?;
    let sets = match section.validation.is_empty() {
        true => train.held_out(section.validation_fraction, config.train.seed)?,
        false => {
            let validation = ImageSet::read(&section.validation, settings, Some(&train.labels), skip)?.labelled()?;
            (train, validation)
        }
    };
    listener.end();
    Ok(sets)
}

/// Rejects images of another size than the model's, and models beyond the memory of the machine.
fn check_images<C: ClassifierConfig>(hub: &ImageHub<C>) -> Result<(), BuildError> {
    let (image, parameters) = (hub.config.image(), hub.config.parameters());
    let side = hub.settings.side().map_err(BuildError::Settings)?;
    if (side, 3) != (image.image_size, image.num_channels) {
        return Err(BuildError::Settings(format!(
            "preprocessor_config.json makes images of {side} x {side} pixels and 3 colours; the model has image_size {} and num_channels {}: correct one of them",
            image.image_size, image.num_channels
        )));
    }
    let (weights, memory) = (4 * parameters as u64, machine_memory());
    match weights > memory {
        true => Err(BuildError::Settings(format!(
            "model: it has {} of weights, more than the {} there are; use a smaller model",
            bytes(weights),
            bytes(memory)
        ))),
        false => Ok(()),
    }
}

impl<M: ImageModel> TrainedModel<M> {
    /// Classifier all of whose weights are trained, new or from a folder.
    fn whole(hub: ImageHub<M::Config>, folder: Option<PathBuf>) -> Self {
        Self {
            hub,
            storage: MatrixStorage::Wide,
            folder,
            adapter: None,
            begun: None,
            rule: Box::default(),
            allocation: None,
        }
    }
}
