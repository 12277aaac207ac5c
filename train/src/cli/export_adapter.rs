//! Adapters of `lowrank export`: the form of Python's peft, and plain LoRA of a rank.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context;
use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::ModelError;
use lowrank_models::adapter::compose::{Composite, Composition, Layer, Matrix, Source, SvdSum};
use lowrank_models::adapter::{AdapterConfig, AdapterError, Attach, Factors, GivenTensors, Targets, each_adapted};
use lowrank_models::hub::peft::{
    FolderFactors, Form, PeftFolder, PlainLora, PlainSettings, save, save_adalora, save_as,
};
use lowrank_models::hub::{ModelFolder, VisionFolder, VisionModel};
use serde_json::json;

use super::folder;
use super::on_model::Adapters;
use super::output::table;
use super::vision_folder::VisionOf;
use crate::build::BuildError;
use crate::process::device;
use crate::recipe::LABELS;

/// Writes an adapter of a model in the form of peft.
pub fn with_model(adapters: &Adapters, adapter: &Path, model: &Path, out: &Path) -> anyhow::Result<()> {
    let device = device("cpu").map_err(BuildError::from)?;
    if VisionFolder::is_one(model).map_err(BuildError::from)? {
        return match VisionOf::open(model)?.load(adapters, &device)? {
            VisionModel::Vit(adapted) => write(&*adapted, adapter, model, out),
            VisionModel::ClipVision(adapted) => write(&*adapted, adapter, model, out),
            VisionModel::Clip(adapted) => write(&*adapted, adapter, model, out),
            VisionModel::ClipClassifier(adapted) => write(&*adapted, adapter, model, out),
        };
    }
    let base = ModelFolder::open(model).and_then(|from| from.load(&device)).map_err(BuildError::from)?;
    write(&adapters.on(base)?, adapter, model, out)
}

/// Writes the adapter of an adapted model, with the classes that an adapter of images states.
fn write<M: Module>(adapted: &M, adapter: &Path, model: &Path, out: &Path) -> anyhow::Result<()> {
    let (name, base) = (adapter.to_string_lossy(), model.to_string_lossy());
    let labels = adapter.join(LABELS);
    folder::whole(out, |dir| {
        save_as(adapted, &name, "default", Form::Peft, Some(&base), dir).map_err(BuildError::from)?;
        if labels.exists() {
            let text = std::fs::read(&labels).with_context(|| format!("cannot read {LABELS}"))?;
            std::fs::write(dir.join(LABELS), text).with_context(|| format!("cannot write {LABELS}"))?;
        }
        Ok(())
    })
}

/// Writes an adapter as plain LoRA of a rank; returns the residuals as text or JSON.
pub fn as_lora(adapter: &Path, model: Option<&Path>, rank: usize, json: bool, out: &Path) -> anyhow::Result<String> {
    if rank == 0 {
        return Err(BuildError::Settings("--rank 0: it must be at least 1".into()).into());
    }
    let residuals = converted(adapter, model, rank, out)?;
    Ok(if json { format!("{:#}\n", json!({ "rank": rank, "residuals": residuals })) } else { shown(&residuals) })
}

fn open(adapter: &Path) -> Result<PeftFolder, BuildError> {
    let folder = PeftFolder::open(adapter)?;
    for warning in &folder.warnings {
        eprintln!("warning: {}: {warning}", adapter.display());
    }
    Ok(folder)
}

/// The model with the adapter, and the name of the model.
fn attached(adapter: &Path, model: &Path) -> Result<(lowrank_models::Llama, Option<String>), BuildError> {
    let folder = open(adapter)?;
    let base = folder.base_model.clone();
    let model = ModelFolder::open(model)?.load(&device("cpu")?)?;
    let model = if folder.has_own_head() { model.with_own_head() } else { model };
    Ok((folder.attach(model)?.0, base))
}

/// Writes an adapter without its model: unchanged if peft reads it as it is, otherwise as the plain LoRA that it equals.
pub fn alone(adapter: &Path, out: &Path) -> anyhow::Result<()> {
    let opened = open(adapter)?;
    if opened.is_form_of_peft() {
        return folder::whole(out, |dir| {
            for name in ["adapter_config.json", "adapter_model.safetensors"] {
                // Written instead of copied, so that the umask determines the permissions.
                let bytes = std::fs::read(adapter.join(name)).with_context(|| format!("cannot read {name}"))?;
                std::fs::write(dir.join(name), bytes).with_context(|| format!("cannot write {name}"))?;
            }
            Ok(())
        });
    }
    let factors = opened.factors().map_err(BuildError::from)?;
    let settings = settings_of(&factors);
    folder::whole(out, |dir| {
        let plain = PlainLora::create(dir).map_err(BuildError::from)?;
        let mut plain = plain.with_embeddings(settings.embeddings.clone());
        for layer in factors {
            let layer = layer.map_err(BuildError::from)?;
            plain.push(&layer.path, &layer.factors).map_err(BuildError::from)?;
        }
        Ok(plain.finish(settings).map_err(BuildError::from)?)
    })
}

/// Settings of a plain LoRA made of the factors of a folder.
fn settings_of(factors: &FolderFactors) -> PlainSettings {
    PlainSettings {
        targets: None,
        base_model: factors.base_model.clone(),
        base: factors.base.clone(),
        embeddings: factors.embeddings(),
    }
}

/// Writes an adapter as plain LoRA of a rank; returns the share of the norm that each layer loses.
fn converted(adapter: &Path, model: Option<&Path>, rank: usize, out: &Path) -> anyhow::Result<BTreeMap<String, f64>> {
    let mut residuals = BTreeMap::new();
    folder::whole(out, |dir| {
        let plain = PlainLora::create(dir).map_err(BuildError::from)?;
        let (plain, settings) = match model {
            None => {
                let layers = open(adapter)?.factors().map_err(BuildError::from)?;
                let settings = settings_of(&layers);
                let mut plain = plain.with_embeddings(settings.embeddings.clone());
                for layer in layers {
                    let layer = layer.map_err(BuildError::from)?;
                    let source = Source::of("adapter", layer.factors, None);
                    let (factors, residual) = truncated_factors(&layer.path, source, rank).map_err(BuildError::from)?;
                    residuals.insert(layer.path.clone(), residual);
                    plain.push(&layer.path, &factors).map_err(BuildError::from)?;
                }
                (plain, settings)
            }
            Some(model) => {
                let (model, base_model) = attached(adapter, model)?;
                let (base, besides) =
                    (base_of(adapter)?, PeftFolder::open(adapter).and_then(|mut from| from.besides()));
                let embeddings = embeddings_of(&model);
                let mut plain = plain.with_embeddings(embeddings.clone());
                let mut failed = None;
                each_adapted(&model, |path, weight, adapters| {
                    let Some(adapter) = adapters.stack.first().filter(|_| failed.is_none()) else { return };
                    let made = delta(path, weight, adapter).and_then(|delta| {
                        let most = delta.nrows().min(delta.ncols());
                        let made = Composite::Dense { delta, rank: rank.min(most) };
                        let Some((factors, residual)) = made.into_factors() else {
                            unreachable!("an update has factors")
                        };
                        residuals.insert(path.to_string(), residual);
                        plain.push(path, &factors)
                    });
                    failed = made.err();
                });
                if let Some(error) = failed {
                    return Err(BuildError::from(error).into());
                }
                plain.push_besides(besides.map_err(BuildError::from)?).map_err(BuildError::from)?;
                (plain, PlainSettings { targets: None, base_model, base, embeddings })
            }
        };
        Ok(plain.finish(settings).map_err(BuildError::from)?)
    })?;
    Ok(residuals)
}

/// Writes an adapter whose updates have few non-zero elements as peft's SHiRA, which has one rank for all layers: values beyond those of a layer are
/// zero.
pub fn as_shira(adapter: &Path, model: &Path, out: &Path) -> anyhow::Result<()> {
    let (adapted, base_model) = attached(adapter, model)?;
    refuse_besides(adapter, "shira")?;
    let (mut layers, mut failed) = (BTreeMap::new(), None);
    each_adapted(&adapted, |path, weight, adapters| {
        let Some(adapter) = adapters.stack.first().filter(|_| failed.is_none()) else { return };
        match delta(path, weight, adapter) {
            Ok(delta) => drop(layers.insert(path.to_string(), Sparse::of(&delta))),
            Err(error) => failed = Some(error),
        }
    });
    drop(adapted);
    if let Some(error) = failed {
        return Err(BuildError::from(error).into());
    }
    let rank = layers.values().map(Sparse::rank).max().unwrap_or(0).max(1);
    if let Some((path, sparse)) = layers.iter().find(|(_, sparse)| !sparse.holds(rank)) {
        let [d_out, d_in] = sparse.shape;
        let problem = format!(
            "--as shira: rank {rank}, which the updates need, has {} values at {path}, of {} elements; these updates are not sparse: use --as lora",
            rank * (d_in + d_out),
            d_in * d_out
        );
        return Err(BuildError::Settings(problem).into());
    }
    let tensors = layers.iter().map(|(path, sparse)| (path.clone(), sparse.tensors(rank))).collect();
    let config =
        AdapterConfig::new("shira").with_rank(rank).with_targets(Targets::Names(layers.keys().cloned().collect()));
    let device = device("cpu").map_err(BuildError::from)?;
    let base = ModelFolder::open(model).and_then(|from| from.load(&device)).map_err(BuildError::from)?;
    let (sparse, _) = base.attach(Attach::new(config).with_tensors(tensors)).map_err(BuildError::from)?;
    let base = base_model.unwrap_or_else(|| model.to_string_lossy().into_owned());
    folder::whole(out, |dir| Ok(save(&sparse, "default", Form::Peft, Some(&base), dir).map_err(BuildError::from)?))
}

/// Writes an adapter of components with values as peft's AdaLoRA.
pub fn as_adalora(adapter: &Path, model: &Path, out: &Path) -> anyhow::Result<()> {
    let (adapted, base_model) = attached(adapter, model)?;
    refuse_besides(adapter, "adalora")?;
    let base = base_model.unwrap_or_else(|| model.to_string_lossy().into_owned());
    folder::whole(out, |dir| Ok(save_adalora(&adapted, "default", Some(&base), dir).map_err(BuildError::from)?))
}

/// Rejects an adapter folder with weights that belong to no layer of the adapter.
fn refuse_besides(adapter: &Path, convert: &str) -> Result<(), BuildError> {
    let folder = PeftFolder::open(adapter)?;
    match folder.trains().first() {
        None => Ok(()),
        Some(name) => Err(BuildError::Settings(format!(
            "--as {convert}: {} holds {name} besides its adapter, which would be lost; use --as lora, or merge it (lowrank merge)",
            adapter.display()
        ))),
    }
}

/// Paths of the adapted embeddings of a model.
fn embeddings_of(model: &lowrank_models::Llama) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    each_adapted(model, |path, _, adapters| {
        if adapters.stack.iter().any(|adapter| adapter.place().embedding) {
            found.insert(path.to_string());
        }
    });
    found
}

/// The non-zero elements of an update `[d_out, d_in]`.
struct Sparse {
    shape: [usize; 2],
    elements: Vec<(usize, f32)>,
}

impl Sparse {
    fn of(delta: &Matrix) -> Self {
        let (d_out, d_in) = delta.shape();
        let value = |place: usize| (place, delta[(place / d_in, place % d_in)] as f32);
        let elements = (0..d_out * d_in).map(value).filter(|(_, value)| *value != 0.0).collect();
        Self { shape: [d_out, d_in], elements }
    }

    /// Least rank with as many values.
    fn rank(&self) -> usize {
        self.elements.len().div_ceil(self.shape.iter().sum())
    }

    /// True if the matrix has as many elements as a rank has values.
    fn holds(&self, rank: usize) -> bool {
        rank * self.shape.iter().sum::<usize>() <= self.shape.iter().product()
    }

    /// Values and their rows and columns, with zeros at the first free places.
    fn tensors(&self, rank: usize) -> GivenTensors {
        let count = rank * self.shape.iter().sum::<usize>();
        let mut elements = self.elements.clone();
        let taken: BTreeSet<usize> = elements.iter().map(|(place, _)| *place).collect();
        let free = (0..self.shape.iter().product()).filter(|place| !taken.contains(place));
        elements.extend(free.take(count - taken.len()).map(|place| (place, 0.0)));
        elements.sort_unstable_by_key(|(place, _)| *place);
        let d_in = self.shape[1];
        let values = elements.iter().map(|(_, value)| *value).collect::<Vec<_>>();
        let rows = elements.iter().map(|(place, _)| (place / d_in) as f32);
        let places: Vec<f32> = rows.chain(elements.iter().map(|(place, _)| (place % d_in) as f32)).collect();
        GivenTensors::from([
            ("weight".to_string(), TensorData::new(values, [count])),
            ("indices".to_string(), TensorData::new(places, [2, count])),
        ])
    }
}

/// Fingerprint of the base weights that an adapter folder states.
fn base_of(adapter: &Path) -> Result<Option<String>, BuildError> {
    Ok(PeftFolder::open(adapter)?.base_fingerprint().map(str::to_string))
}

/// A product of factors truncated to a rank, or as it is if its rank is not larger.
fn truncated_factors(path: &str, source: Source, rank: usize) -> Result<(Factors, f64), ModelError> {
    if source.rank() <= rank {
        return Ok((source.factors(), 0.0));
    }
    let most = source.a.ncols().min(source.b.nrows());
    let layer = Layer::new(path, vec![source])?;
    let svd: &dyn Composition = &SvdSum { rank: Some(rank.min(most)), clamp: None };
    let composed = svd.compose(&layer)?;
    let residual = composed.report.get("residual").and_then(serde_json::Value::as_f64).unwrap_or(0.0);
    let Some((factors, _)) = composed.result.into_factors() else { unreachable!("svd makes factors") };
    Ok((factors, residual))
}

/// The change `[d_out, d_in]` that an adapter makes of the weight `[d_in, d_out]` below it.
fn delta(path: &str, weight: &Tensor<2>, adapter: &lowrank_models::adapter::Adapter) -> Result<Matrix, ModelError> {
    let structure = adapter.structure();
    let spec = adapter.structure.spec();
    let refused = |reason: &str| AdapterError::Refused(format!("{path}: {} {reason}", spec.name));
    if let Err(reason) = spec.merges {
        return Err(refused(&format!("is no change of a weight ({reason}); it cannot become a plain LoRA")).into());
    }
    if spec.changes_bias && adapter.place().bias {
        return Err(refused("changes the bias too; merge it into its model instead (lowrank merge)").into());
    }
    let weight = weight.clone().without_autodiff();
    let below = match &adapter.origin {
        Some(origin) => weight - origin.delta().without_autodiff(),
        None => weight,
    };
    let Some(update) = structure.delta_weight(&below) else {
        return Err(refused("has no dense update; it cannot become a plain LoRA").into());
    };
    let update = match &adapter.origin {
        Some(origin) => update.without_autodiff() - origin.delta().without_autodiff(),
        None => update.without_autodiff(),
    };
    let [d_in, d_out] = update.dims();
    let values = lowrank_kernels::host::values(update);
    Ok(Matrix::from_iterator(d_out, d_in, values.into_iter().map(f64::from)))
}

/// The mean residual, and the largest ones by layer.
fn shown(residuals: &BTreeMap<String, f64>) -> String {
    const SHOWN: usize = 5;
    let mean = residuals.values().sum::<f64>() / residuals.len().max(1) as f64;
    let mut largest: Vec<(&String, &f64)> = residuals.iter().collect();
    largest.sort_by(|a, b| b.1.total_cmp(a.1));
    let mut rows = vec![vec!["share of the norm left out".into(), format!("mean {mean:.4}")]];
    rows.extend(largest.into_iter().take(SHOWN).map(|(path, share)| vec![format!("  {path}"), format!("{share:.4}")]));
    table(&rows)
}
