//! `lowrank eval` of a classifier of images: accuracy, whole and by class and domain.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::anyhow;
use burn::tensor::Device;
use lowrank_models::ImageClassifier;
use lowrank_models::hub::VisionModel;

use super::on_model::Adapters;
use super::output::{print, table};
use super::vision_folder::VisionOf;
use crate::build::{BuildError, Listener};
use crate::config::{Config, count};
use crate::data::images::ImageSet;
use crate::objective::{Classified, ImageStream};
use crate::run::report::Console;

/// Measures a classifier on all images of the configuration.
pub fn eval_images(
    vision: &VisionOf,
    adapters: &Adapters,
    config: &Config,
    batch: usize,
    device: &Device,
    console: Console,
) -> anyhow::Result<()> {
    match vision.load(adapters, device)? {
        VisionModel::Vit(model) => measure(&*model, &model.config().labels, vision, config, batch, device, console),
        VisionModel::ClipClassifier(model) => {
            measure(&*model, &model.config().labels, vision, config, batch, device, console)
        }
        _ => Err(BuildError::Settings(format!(
            "--model {}: a CLIP has no classes; `lowrank finetune` trains a classifier on it, `lowrank embed` computes its embeddings",
            vision.dir.display()
        ))
        .into()),
    }
}

fn measure(
    model: &impl ImageClassifier,
    labels: &[String],
    vision: &VisionOf,
    config: &Config,
    batch: usize,
    device: &Device,
    mut console: Console,
) -> anyhow::Result<()> {
    let paths: &[PathBuf] = &config.data.path;
    console.begin("reading the images", 0);
    let set = ImageSet::read(paths, &vision.settings, Some(labels), config.data.images.skip_broken);
    let set = set.and_then(ImageSet::labelled).map_err(BuildError::from)?;
    let (skipped, total) = (set.skipped, set.len() as u64);
    console.begin("evaluating", total);
    let stream = ImageStream::new(Arc::new(set), batch);
    let found = Classified::of(model, &stream, None, device, |done| console.advance(done)).map_err(BuildError::from)?;
    console.end();
    if !found.loss().is_finite() {
        return Err(anyhow!("the loss is {}: the weights are damaged or too large", found.loss()));
    }
    let mut rows = vec![
        vec!["images".to_string(), count(found.images())],
        vec!["loss".into(), format!("{:.4} nats an image", found.loss())],
        vec!["accuracy".into(), format!("{:.2} %", 100.0 * found.accuracy())],
    ];
    if skipped > 0 {
        rows.insert(1, vec!["left out".into(), format!("{} broken images", count(skipped as u64))]);
    }
    let part = |what: &str, name: &str, [correct, all]: [u64; 2]| {
        vec![format!("{what} {name}"), format!("{:.2} % of {}", 100.0 * correct as f64 / all as f64, count(all))]
    };
    rows.extend(found.classes().map(|(name, numbers)| part("class", name, numbers)));
    rows.extend(found.domains().iter().map(|(name, numbers)| part("domain", name, *numbers)));
    print(&table(&rows))
}
