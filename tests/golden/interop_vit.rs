//! Vision transformers and CLIP in folders of `transformers`, and their adapters by `peft`: pixels, outputs, losses, gradients, and folders that
//! are written back bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Gradients, Tensor};
use lowrank_models::adapter::{each_adapter, merged};
use lowrank_models::hub::peft::{Form, PeftFolder, save};
use lowrank_models::hub::{MAX_SHARD_BYTES, VisionFolder, VisionModel, save_vision, vit_file_name, vit_module_name};
use lowrank_models::vit::{Clip, ImageBatch};
use lowrank_models::{Dense, ImageClassifier, VisionTransformer};
use lowrank_optim::ModulePath;
use lowrank_train::data::images::{ImageSettings, Picture};
use safetensors::SafeTensors;

use super::support::case::{Array, Case, Outcome, host};

/// Pixels, numbers and folders of one case.
pub fn run(case: &Case) -> Outcome {
    let kind = case.word("kind")?;
    let folder = case.path.with_file_name(case.word(if kind == "vit-peft" { "model" } else { "folder" })?);
    let mut checked = Vec::new();
    if case.has("images") {
        let worst = pixels(case, &folder)?;
        checked.push(format!("pixels within {worst:.1e}"));
    }
    if kind == "vit-peft" {
        checked.push(adapter(case, &folder)?);
        return Ok(checked.join(", "));
    }
    let device = Device::default().autodiff();
    let model = VisionFolder::open(&folder).and_then(|folder| folder.load(&device)).map_err(text)?;
    let grads = match (&model, kind) {
        (VisionModel::Vit(model), "vit") => classes(case, &**model, |x| model.logits_of(x))?,
        (VisionModel::ClipVision(model), "clip-vision") => {
            let pixels = case.array("pixel_values")?.tensor();
            let hidden = model.vision_model.hidden(pixels);
            near(case, "last_hidden_state", hidden.clone(), 1e-4)?;
            let embeds = model.visual_projection.forward(model.vision_model.pooled(hidden));
            near(case, "image_embeds", embeds.clone(), 1e-4)?;
            let target = Tensor::from_inner(case.array("target")?.tensor::<2>());
            loss(case, (embeds - target).square().mean())?
        }
        (VisionModel::Clip(model), "clip") => clip(case, model)?,
        (VisionModel::ClipClassifier(model), "clip-classifier") => classes(case, &**model, |x| model.logits_of(x))?,
        _ => return Err(format!("kind is \"{kind}\", and the folder holds another model")),
    };
    let (count, worst) = match &model {
        VisionModel::Vit(model) => gradients(case, &**model, grads, vit_file_name)?,
        VisionModel::ClipVision(model) => gradients(case, &**model, grads, str::to_string)?,
        VisionModel::Clip(model) => gradients(case, &**model, grads, str::to_string)?,
        VisionModel::ClipClassifier(model) => gradients(case, &**model, grads, str::to_string)?,
    };
    checked.push(format!("outputs equal, {count} gradients within {worst:.1e}"));
    written_back(&model, &folder)?;
    Ok(format!("{}, the folder is written back bit for bit", checked.join(", ")))
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn near<const D: usize>(case: &Case, name: &str, ours: Tensor<D>, absolute: f64) -> Result<f64, String> {
    let expected = case.array(name)?;
    let shape = ours.dims();
    if expected.shape != shape {
        return Err(format!("{name} has shape {shape:?} instead of {:?}", expected.shape));
    }
    expected.near(name, &host(ours.inner()), absolute, 0.0)
}

/// The loss of a case, and its gradients.
fn loss(case: &Case, loss: Tensor<1>) -> Result<Gradients, String> {
    case.array("loss")?.near("loss", &host(loss.clone().inner()), 1e-5, 0.0)?;
    Ok(loss.backward())
}

/// Pixels that the settings of the folder make of the images.
fn pixels(case: &Case, folder: &Path) -> Result<f64, String> {
    let images = case.array("images")?;
    let [count, height, width, 3] = images.shape[..] else { return Err("images have three colours".into()) };
    let size = height * width * 3;
    let picture = |number: usize| {
        let bytes = images.values[number * size..(number + 1) * size].iter().map(|value| *value as u8);
        Picture { width, height, pixels: bytes.collect() }
    };
    let pictures: Vec<Picture> = (0..count).map(picture).collect();
    let found = ImageSettings::read(folder).map_err(text)?.batch(&pictures);
    // One step of a byte, after the division by the deviation.
    case.array("pixel_values")?.near("pixel_values", &found, 0.016, 0.0)
}

fn batch(case: &Case) -> Result<ImageBatch, String> {
    let labels = case.array("labels")?;
    let data = burn::tensor::TensorData::new(labels.i32(), labels.shape.clone());
    let labels = Tensor::from_data(data, &Device::default());
    Ok(ImageBatch { pixels: case.array("pixel_values")?.tensor(), labels })
}

fn classes<M>(case: &Case, model: &M, logits_of: impl Fn(Tensor<3>) -> Tensor<2>) -> Result<Gradients, String>
where
    M: ImageClassifier<Hidden = Tensor<3>>,
{
    let batch = batch(case)?;
    let hidden = model.last_hidden(&batch);
    near(case, "logits", logits_of(hidden.clone()), 1e-4)?;
    loss(case, model.loss(hidden, &batch) / M::counted(&batch) as f64)
}

fn clip(case: &Case, model: &Clip) -> Result<Gradients, String> {
    let rows = |array: Array| -> Vec<Vec<i32>> { array.i32().chunks(array.shape[1]).map(<[i32]>::to_vec).collect() };
    let mask = if case.has("attention_mask") { Some(rows(case.array("attention_mask")?)) } else { None };
    let texts = model.text_embeds(&rows(case.array("input_ids")?), mask.as_deref()).map_err(text)?;
    let images = model.image_embeds(case.array("pixel_values")?.tensor());
    near(case, "text_embeds", texts.clone(), 1e-4)?;
    near(case, "image_embeds", images.clone(), 1e-4)?;
    let logits = model.logits_per_image(images, texts);
    near(case, "logits_per_image", logits.clone(), 1e-4)?;
    near(case, "logits_per_text", logits.clone().transpose(), 1e-4)?;
    loss(case, Clip::contrastive_loss(logits))
}

/// Compares all gradients of a case by the names of the file; their number, and the largest difference as a part of the largest entry.
fn gradients<M: Module>(
    case: &Case,
    model: &M,
    grads: Gradients,
    name_of: fn(&str) -> String,
) -> Result<(usize, f64), String> {
    let found = file_gradients(model, GradientsParams::from_grads(grads, model), name_of);
    let (mut count, mut worst) = (0, 0f64);
    for name in case.names() {
        let Some(weight) = name.strip_prefix("grad.") else { continue };
        let expected = case.array(&name)?;
        let ours = found.get(&name_of(weight)).ok_or_else(|| format!("there is no gradient of {weight}"))?;
        let off = expected.near(&name, ours, 1e-4 * expected.largest(), 0.0)?;
        worst = worst.max(off / expected.largest());
        count += 1;
    }
    if count == 0 { Err("the case has no gradient".into()) } else { Ok((count, worst)) }
}

/// Gradients by the names and in the order of files.
fn file_gradients<M: Module>(
    model: &M,
    grads: GradientsParams,
    name: fn(&str) -> String,
) -> BTreeMap<String, Vec<f32>> {
    struct Collector {
        grads: GradientsParams,
        path: ModulePath,
        name: fn(&str) -> String,
        found: BTreeMap<String, Vec<f32>>,
    }
    impl ModuleVisitor for Collector {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(grad) = self.grads.get::<D>(param.id) else { return };
            let linear = D == 2 && self.path.containers().any(|container| container == "Struct:Dense");
            let grad = if linear { grad.swap_dims(0, 1) } else { grad };
            self.found.insert((self.name)(&self.path.joined()), host(grad));
        }
    }
    let mut collector = Collector { grads, path: ModulePath::default(), name, found: BTreeMap::new() };
    model.visit(&mut collector);
    collector.found
}

/// Writes the model: the same tensors with the same bits, and a configuration that is read back the same.
fn written_back(model: &VisionModel, folder: &Path) -> Result<(), String> {
    let again = tempfile::tempdir().map_err(text)?;
    let before = VisionFolder::open(folder).map_err(text)?;
    save_vision(model, &before.config.extra, &before.types().map_err(text)?, again.path(), MAX_SHARD_BYTES)
        .map_err(text)?;
    same_tensors(folder, again.path(), vit_file_name)?;
    let after = VisionFolder::open(again.path()).map_err(text)?;
    match before.config == after.config {
        true => Ok(()),
        false => Err(format!("config.json was {:?} and is written as {:?}", before.config, after.config)),
    }
}

/// Shape, type and bytes of a tensor.
type Stored = (Vec<usize>, String, Vec<u8>);

/// All tensors in the safetensors files of a folder.
fn stored(dir: &Path) -> Result<BTreeMap<String, Stored>, String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(text)? {
        let path = entry.map_err(text)?.path();
        if path.extension().is_some_and(|end| end == "safetensors") {
            let bytes = std::fs::read(path).map_err(text)?;
            for (name, view) in SafeTensors::deserialize(&bytes).map_err(text)?.tensors() {
                found.insert(name, (view.shape().to_vec(), format!("{:?}", view.dtype()), view.data().to_vec()));
            }
        }
    }
    Ok(found)
}

/// Compares names, shapes, types and bytes; `rename` gives the names of the first folder in the second.
fn same_tensors(before: &Path, after: &Path, rename: impl Fn(&str) -> String) -> Result<(), String> {
    let renamed = |(name, tensor): (String, _)| (rename(&name), tensor);
    let before: BTreeMap<_, _> = stored(before)?.into_iter().map(renamed).collect();
    let after = stored(after)?;
    if !before.keys().eq(after.keys()) {
        return Err(format!("{:?} were written for {:?}", after.keys(), before.keys()));
    }
    match before.iter().find(|(name, tensor)| after[*name] != **tensor) {
        None => Ok(()),
        Some((name, _)) => Err(format!("{name} was written with another shape, type or bits")),
    }
}

/// An adapter folder on its model: logits, loss, gradients of factors and classifier, merged logits, and the folder written back.
fn adapter(case: &Case, folder: &Path) -> Outcome {
    let dir: PathBuf = case.path.with_file_name(case.word("folder")?);
    let device = Device::default().autodiff();
    let base = match VisionFolder::open(folder).and_then(|folder| folder.load(&device)).map_err(text)? {
        VisionModel::Vit(model) => *model,
        _ => return Err("the adapter belongs to a vision transformer".into()),
    };
    let (model, _) = PeftFolder::open(&dir)
        .and_then(|folder| folder.attach_by(base.clone(), VisionTransformer::attach))
        .map_err(text)?;
    let brings = stored(&dir)?.keys().any(|name| name.contains("classifier.") && !name.contains("lora_"));
    let model = if brings { model.with_trained_classifier() } else { model };
    let grads = classes(case, &model, |x| model.logits_of(x))?;
    let grads = GradientsParams::from_grads(grads, &model);
    let mut found = BTreeMap::new();
    each_adapter(&model, |path, adapter| {
        for tensor in adapter.stack.iter().flat_map(|adapter| adapter.shapes()) {
            let Some(grad) = grads.get::<2>(tensor.id) else { continue };
            let grad = if tensor.transposed { grad.transpose() } else { grad };
            found.insert(format!("{path}.lora_{}.weight", tensor.field.to_uppercase()), host(grad));
        }
    });
    found.extend(file_gradients(&model.classifier, grads, |path| format!("classifier.{path}")));
    for name in case.names() {
        let Some(weight) = name.strip_prefix("grad.base_model.model.") else { continue };
        let expected = case.array(&name)?;
        let ours = found.get(&vit_module_name(weight)).ok_or_else(|| format!("there is no gradient of {weight}"))?;
        expected.near(&name, ours, 1e-4 * expected.largest(), 0.0)?;
    }
    for form in [Form::Peft, Form::Own] {
        let again = tempfile::tempdir().map_err(text)?;
        save(&model, "default", form, None, again.path()).map_err(text)?;
        same_tensors(&dir, again.path(), |name| match name.strip_prefix("base_model.model.") {
            Some(inner) => format!("base_model.model.{}", vit_module_name(inner)),
            None => name.to_string(),
        })?;
        let folder = PeftFolder::open(again.path()).map_err(text)?;
        let (read, _) = folder.attach_by(base.clone(), VisionTransformer::attach).map_err(text)?;
        near(case, "logits", read.logits(case.array("pixel_values")?.tensor()), 1e-4)?;
    }
    let merged = merged(model).map_err(text)?;
    near(case, "merged_logits", merged.logits(case.array("pixel_values")?.tensor()), 1e-4)?;
    let classifier: &Dense = &merged.classifier;
    if brings && host(classifier.weight.val().inner()) == host(base.classifier.weight.val().inner()) {
        return Err("the classifier of the adapter was not taken".into());
    }
    Ok("adapter, classifier and their gradients are equal, merged as well, and the folder is written back bit for bit"
        .into())
}
