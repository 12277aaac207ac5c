//! Writing adapter folders.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde_json::{Map, json};

use super::brought::{COPY, EMBEDDING, HEAD, Held, Parameters, ROWS};
use super::config::Written;
use super::folder::{CONFIG, MODEL, Mark, OURS, Ours, SHARED, WEIGHTS, adapter_dir, attached, digits};
use super::layout::{Layout, Stored};
use super::saved::{is_of, trained_modules, whole_paths};
use crate::error::ModelError;
use crate::weights::host;
use lowrank_adapters::{
    Adapter, AdapterConfig, AdapterError, Alpha, Rank, Scaling, Size, Targets, TrainedBiases, base_fingerprint, biases,
    saved_parameters, shared_fingerprint, sizes,
};

/// Form in which an adapter is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Readable by `peft`: in its layout, or as the plain LoRA that it equals. Any other adapter is rejected.
    Peft,
    /// As it is, so that it can be trained further: in the layout of `peft` if it can represent the whole adapter.
    Own,
}

/// Writes an adapter of a module into [`adapter_dir`] of its name; `base_model` is noted as the model it belongs to.
///
/// Files of the same names are replaced, one after the other: use a new folder and rename it when an interruption must not leave half an
/// adapter.
pub fn save<M: Module>(
    module: &M,
    name: &str,
    form: Form,
    base_model: Option<&str>,
    dir: &Path,
) -> Result<(), ModelError> {
    save_as(module, name, name, form, base_model, dir)
}

/// As [`save`], into the folder of another name.
pub fn save_as<M: Module>(
    module: &M,
    name: &str,
    written: &str,
    form: Form,
    base_model: Option<&str>,
    dir: &Path,
) -> Result<(), ModelError> {
    let dir = adapter_dir(dir, written)?;
    let mut layers = attached(module, name);
    let Some(config) = layers.values().next().map(|layer| resolved(layer.control().config())) else {
        return Err(AdapterError::Refused(format!("the model has no adapter \"{name}\"")).into());
    };
    let sizes = sizes(module, name)?;
    let mut config = of_sizes(config, &sizes);
    // peft has no rank 0: layers without an update are left out.
    let is_empty = |layer: &Adapter| {
        layer.place().rank == 0 || layer.structure().active_components().is_some_and(|active| active.is_empty())
    };
    let ranked = config.rank.is_some();
    let empty: Vec<String> =
        layers.iter().filter(|(_, layer)| ranked && is_empty(layer)).map(|(path, _)| path.clone()).collect();
    if form == Form::Peft && !empty.is_empty() {
        layers.retain(|path, _| !empty.contains(path));
        config.exclude = Some(Targets::Names(empty));
        if layers.is_empty() {
            let reason =
                format!("every layer of the adapter \"{name}\" has rank 0: there is nothing to write for peft");
            return Err(AdapterError::Refused(reason).into());
        }
    }
    let begun = layers.values().any(|layer| layer.origin.is_some());
    let mut folder = match (layout(&config), form) {
        (Ok(Some((layout, keys))), Form::Peft) if begun => {
            Folder { config: doubled(config)?, layout: Some((layout, keys)), tensors: beside_start(&layers, layout)? }
        }
        (Ok(Some((layout, keys))), _) => {
            Folder { tensors: in_layout(&layers, Some(layout)), config, layout: Some((layout, keys)) }
        }
        (_, Form::Own) => Folder { tensors: in_layout(&layers, None), config, layout: None },
        (Ok(None), Form::Peft) => as_factors(&layers, config)?,
        (Err(reason), Form::Peft) => {
            return Err(
                AdapterError::Refused(format!("{}: peft has no such adapter: {reason}", config.structure)).into()
            );
        }
    };
    for trained in trained_modules(module) {
        let saved = &mut folder.config.modules_to_save;
        if !is_of(&format!("{trained}.weight"), saved) {
            saved.push(trained);
        }
    }
    let parameters = saved_parameters(module, &folder.config.modules_to_save)?;
    folder.config.modules_to_save = whole_paths(parameters.keys(), &folder.config.modules_to_save);
    folder.tensors.extend(beside(module, &folder.config, &layers)?);
    let (table, head) = (format!("{MODEL}{EMBEDDING}"), format!("{MODEL}{HEAD}"));
    let tied = !Parameters::of(module, Some(BTreeSet::new())).contains_key(HEAD);
    let tied = folder.tensors.get(&table).filter(|_| tied).cloned();
    let ties = tied.is_some();
    if let Some(table) = tied {
        // peft expects the tied head under its own name too.
        folder.tensors.insert(head, table);
    }
    let base = Some(digits(base_fingerprint(module, &layers.keys().cloned().collect())));
    let shared = match folder.layout {
        Some(_) => None,
        None => shared_fingerprint(layers.values()).map(digits),
    };
    let adapter = (folder.layout.is_some() && form == Form::Own).then(|| Ours::of(&folder.config));
    let shapes = match folder.layout {
        Some(_) => BTreeMap::new(),
        None => layers.iter().map(|(path, layer)| (path.clone(), layer.place().shape)).collect(),
    };
    let sizes = if form == Form::Own { sizes } else { BTreeMap::new() };
    let embeddings = match folder.layout {
        Some(_) => BTreeSet::new(),
        None => layers.iter().filter(|(_, layer)| layer.place().embedding).map(|(path, _)| path.clone()).collect(),
    };
    let mark = Mark { base, shared, sizes, shapes, embeddings, adapter };
    std::fs::create_dir_all(&dir).map_err(ModelError::io(&dir))?;
    write_tensors(&dir.join(WEIGHTS), folder.tensors, &mark)?;
    let paths = layers.keys().map(String::as_str).collect();
    let text = Written { config: &folder.config, layout: folder.layout, paths, base_model, ties }.text();
    let path = dir.join(CONFIG);
    std::fs::write(&path, text).map_err(ModelError::io(path))
}

/// Content of a folder.
struct Folder {
    config: AdapterConfig,
    layout: Option<Stored>,
    tensors: BTreeMap<String, TensorData>,
}

/// The configuration with the defaults of its structure filled in.
fn resolved(config: &AdapterConfig) -> AdapterConfig {
    let mut config = config.clone();
    let Ok(entry) = config.entry() else { unreachable!("the adapter was built") };
    let spec = entry.spec;
    if let (None, Rank::Fixed(rank)) = (config.rank, spec.rank) {
        config.rank = Some(rank);
    }
    match (config.alpha, spec.alpha) {
        (None, Alpha::Fixed(alpha)) => config.alpha = Some(alpha),
        (None, Alpha::Ranks(times)) => {
            config.alpha = config.rank.map(|rank| times * rank as f64);
            // Alpha follows the rank of the layer; a folder states it explicitly.
            for (name, rank) in &config.rank_pattern {
                if config.alpha_pattern.iter().all(|(known, _)| known != name) {
                    config.alpha_pattern.push((name.clone(), times * *rank as f64));
                }
            }
        }
        _ => {}
    }
    if spec.alpha != Alpha::None {
        config.scaling = config.scaling.or(Some(spec.scaling));
    }
    config
}

/// The configuration with patterns for the layers whose rank or scale changed in a run.
fn of_sizes(config: AdapterConfig, sizes: &BTreeMap<String, Size>) -> AdapterConfig {
    let changed: Vec<(String, Size)> =
        sizes.iter().filter(|(_, size)| size.rank > 0).map(|(path, size)| (regex::escape(path), *size)).collect();
    let alpha = |Size { rank, scale }: Size| match config.scaling {
        Some(Scaling::RootRank) => scale * (rank as f64).sqrt(),
        _ => scale * rank as f64,
    };
    let others = |name: &String| changed.iter().all(|(path, _)| path != name);
    let ranks = changed.iter().map(|(path, size)| (path.clone(), size.rank));
    let scaled = changed.iter().filter(|_| config.alpha.is_some());
    let alphas = scaled.map(|(path, size)| (path.clone(), alpha(*size)));
    AdapterConfig {
        rank_pattern: ranks.chain(config.rank_pattern.iter().filter(|(name, _)| others(name)).cloned()).collect(),
        alpha_pattern: alphas.chain(config.alpha_pattern.iter().filter(|(name, _)| others(name)).cloned()).collect(),
        ..config
    }
}

/// Layout in which `peft` stores an adapter, with the keys of its options: none for structures that it does not have, a reason where it lacks an option.
fn layout(config: &AdapterConfig) -> Result<Option<Stored>, String> {
    let Some(layout) = Layout::of(&config.structure) else { return Ok(None) };
    if !config.rank_pattern.is_empty() && layout.ranks.is_none() {
        return Err("ranks cannot differ by layer".into());
    }
    if !config.alpha_pattern.is_empty() && layout.alphas.is_none() {
        return Err("alphas cannot differ by layer".into());
    }
    if !layout.stabilised && config.scaling == Some(Scaling::RootRank) {
        return Err("the scale cannot be stabilised".into());
    }
    Ok(Some((layout, (layout.write)(config)?)))
}

/// Tensors under the names of a layout, or under those of their fields.
fn in_layout(layers: &BTreeMap<String, Adapter>, layout: Option<&'static Layout>) -> BTreeMap<String, TensorData> {
    let mut tensors = BTreeMap::new();
    for (path, layer) in layers {
        for (tensor, data) in layer.tensors() {
            let embedding = layer.place().embedding;
            let name = layout.and_then(|layout| layout.name(&tensor.field, embedding)).unwrap_or(&tensor.field);
            let whole = layout.is_some_and(|layout| layout.whole.contains(&tensor.field.as_str()));
            tensors.insert(format!("{MODEL}{path}.{name}"), if whole { data.convert::<i32>() } else { data });
        }
        for (field, name, axis) in layout.iter().flat_map(|layout| layout.shared) {
            let Some(shared) = layer.structure().shared().into_iter().find(|shared| shared.key == *field) else {
                continue;
            };
            tensors.entry(format!("{SHARED}{name}")).or_insert_with(|| {
                let data = shared.tensor();
                let mut shape = data.shape().as_slice().to_vec();
                if let Some(axis) = axis {
                    shape.insert(*axis, 1);
                }
                TensorData::new(values(data), shape)
            });
        }
    }
    tensors
}

/// Factors that were initialised from part of the weight, as plain LoRA on the whole weight: `[A; A_0]` and `[B, -B_0]`.
fn beside_start(
    layers: &BTreeMap<String, Adapter>,
    layout: &'static Layout,
) -> Result<BTreeMap<String, TensorData>, ModelError> {
    let mut tensors = BTreeMap::new();
    for (path, layer) in layers {
        let all: BTreeMap<String, TensorData> =
            layer.tensors().into_iter().map(|(tensor, data)| (tensor.field, data)).collect();
        let matrix = |field: &str| match all.get(field) {
            Some(data) => Ok(Tensor::<2>::from_data(data.clone(), &Device::default())),
            None => Err(AdapterError::Refused(format!("{path} has no tensor {field}: its start cannot be taken out"))),
        };
        for (field, data) in &all {
            let data = match field.as_str() {
                "a" => Tensor::cat(vec![matrix("a")?, matrix("origin.a")?], 0).into_data(),
                "b" => Tensor::cat(vec![matrix("b")?, matrix("origin.b")?.neg()], 1).into_data(),
                "origin.a" | "origin.b" => continue,
                _ => data.clone(),
            };
            let name = layout.name(field, layer.place().embedding).unwrap_or(field);
            tensors.insert(format!("{MODEL}{path}.{name}"), data);
        }
    }
    Ok(tensors)
}

/// The configuration of the plain LoRA of twice the rank, and of the same scale.
fn doubled(config: AdapterConfig) -> Result<AdapterConfig, ModelError> {
    let patterns = !(config.rank_pattern.is_empty() && config.alpha_pattern.is_empty());
    let root = config.scaling == Some(Scaling::RootRank);
    if root && patterns {
        return Err(AdapterError::Refused(format!(
            "an adapter that began as part of the weight ({}), with a stabilised scale and patterns of rank or alpha, has no plain LoRA of the \
             same scale: keep it in its own form",
            config.init
        ))
        .into());
    }
    let times = if root { 2f64.sqrt() } else { 2.0 };
    Ok(AdapterConfig {
        rank: config.rank.map(|rank| 2 * rank),
        alpha: config.alpha.map(|alpha| times * alpha),
        rank_pattern: config.rank_pattern.into_iter().map(|(name, rank)| (name, 2 * rank)).collect(),
        alpha_pattern: config.alpha_pattern.into_iter().map(|(name, alpha)| (name, times * alpha)).collect(),
        init: "default".into(),
        ..config
    })
}

/// The plain LoRA that an adapter equals, of scale 1.
fn as_factors(layers: &BTreeMap<String, Adapter>, config: AdapterConfig) -> Result<Folder, ModelError> {
    let layout = Layout::lora();
    let mut tensors = BTreeMap::new();
    let mut ranks: Vec<(String, usize)> = Vec::new();
    for (path, layer) in layers {
        let Some([mut a, mut b]) = layer.structure().as_factors() else {
            return Err(AdapterError::Refused(format!(
                "peft has no adapter like {}, and its update is no product of two factors: keep it in its own form, merge it, or convert it with --as lora or --as shira",
                config.structure
            ))
            .into());
        };
        if let Some(start) = &layer.origin {
            a = Tensor::cat(vec![a, start.a.val()], 1);
            b = Tensor::cat(vec![b, start.b.val().mul_scalar(-start.scale)], 0);
        }
        let ([d_in, rank], [_, d_out]) = (a.dims(), b.dims());
        ranks.push((path.clone(), rank));
        for (field, matrix, shape) in [("a", a, [rank, d_in]), ("b", b, [d_out, rank])] {
            let data = TensorData::new(host(matrix.without_autodiff().transpose()), shape);
            let name = layout.name(field, layer.place().embedding).unwrap_or(field);
            tensors.insert(format!("{MODEL}{path}.{name}"), data);
        }
    }
    let rank = ranks.first().map_or(0, |(_, rank)| *rank);
    let others: Vec<(String, usize)> = ranks.into_iter().filter(|(_, own)| *own != rank).collect();
    let config = AdapterConfig {
        rank: Some(rank),
        alpha: Some(rank as f64),
        scaling: Some(Scaling::Rank),
        alpha_pattern: others.iter().map(|(path, rank)| (path.clone(), *rank as f64)).collect(),
        rank_pattern: others,
        init: "default".into(),
        options: Map::new(),
        structure: layout.structure.into(),
        ..config
    };
    let keys = (layout.write)(&config).map_err(AdapterError::Refused)?;
    Ok(Folder { config, layout: Some((layout, keys)), tensors })
}

/// Parameters of the module itself that belong to the adapter, under the names of `peft`: modules that are trained whole, rows of tables and
/// biases.
fn beside<M: Module>(
    module: &M,
    config: &AdapterConfig,
    layers: &BTreeMap<String, Adapter>,
) -> Result<BTreeMap<String, TensorData>, ModelError> {
    let saved = saved_parameters(module, &config.modules_to_save)?;
    let tables = config.token_rows.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let tables = saved_parameters(module, &tables)?;
    let biases = if config.bias == TrainedBiases::None { BTreeMap::new() } else { biases(module) };
    let of_layer = |path: &String| path.strip_suffix(".bias").is_some_and(|layer| layers.contains_key(layer));
    let wanted: BTreeSet<String> = saved.keys().chain(tables.keys()).chain(biases.keys()).cloned().collect();
    let mut tensors = BTreeMap::new();
    if wanted.is_empty() {
        return Ok(tensors);
    }
    for (path, Held { shape, values, .. }) in Parameters::of(module, Some(wanted)) {
        let Some(values) = values else { continue };
        let table = path.strip_suffix(".weight").unwrap_or_default();
        let own = |name: &str| table == name || table.ends_with(&format!(".{name}"));
        let rows = config.token_rows.iter().find(|(name, _)| own(name));
        if let (Some((_, rows)), [_, width]) = (rows, shape.as_slice()) {
            if let Some(row) = rows.iter().find(|row| (**row + 1).saturating_mul(*width) > values.len()) {
                return Err(AdapterError::Refused(format!("{table} has no row {row} to write with the adapter")).into());
            }
            let chosen: Vec<f32> = rows.iter().flat_map(|row| values[row * width..][..*width].to_vec()).collect();
            tensors.insert(format!("{MODEL}{table}{ROWS}"), TensorData::new(chosen, [rows.len(), *width]));
        } else if saved.contains_key(&path) {
            tensors.insert(format!("{MODEL}{path}"), TensorData::new(values, shape));
        } else if of_layer(&path) {
            let layer = path.strip_suffix(".bias").unwrap_or_default();
            tensors.insert(format!("{MODEL}{layer}{COPY}.bias"), TensorData::new(values, shape));
        } else if config.bias == TrainedBiases::All {
            tensors.insert(format!("{MODEL}{path}"), TensorData::new(values, shape));
        }
    }
    Ok(tensors)
}

fn values(data: TensorData) -> Vec<f32> {
    match data.convert::<f32>().try_into_vec() {
        Ok(values) => values,
        Err(error) => unreachable!("data converted to f32 is f32: {error:?}"),
    }
}

/// Writes a safetensors file whose header is sorted too: the same adapter always results in the same bytes.
pub(super) fn write_tensors(path: &Path, tensors: BTreeMap<String, TensorData>, mark: &Mark) -> Result<(), ModelError> {
    let Ok(mark) = serde_json::to_string(mark) else { unreachable!("texts and numbers are JSON") };
    let mut header = BTreeMap::from([("__metadata__".to_string(), json!({"format": "pt", OURS: mark}))]);
    let mut end = 0;
    for (name, data) in &tensors {
        let (begin, shape) = (end, data.shape().as_slice().to_vec());
        end += 4 * shape.iter().product::<usize>();
        let dtype = if data.dtype() == DType::I32 { "I32" } else { "F32" };
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}));
    }
    let mut text = json!(header).to_string();
    // The data starts at a multiple of 8.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())?;
        for data in tensors.into_values() {
            if data.dtype() == DType::I32 {
                file.write_all(data.as_bytes())?;
                continue;
            }
            for value in values(data) {
                file.write_all(&value.to_le_bytes())?;
            }
        }
        file.flush()
    };
    write().map_err(ModelError::io(path))
}
