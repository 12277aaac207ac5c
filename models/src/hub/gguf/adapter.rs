//! LoRA adapters: files with two factors for each adapted tensor.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::TensorData;
use lowrank_adapters::{
    AdapterConfig, AdapterError, Attach, GivenTensors, LayerFactors, Report, Scaling, Size, Targets,
};

use super::architecture::Architecture;
use super::config;
use super::container::GgufFile;
use super::names::{Heads, in_halves, interleaved, layer_of_gguf, to_gguf};
use super::types::TensorType;
use super::write::{Entry, Metadata, Written, write};
use crate::error::ModelError;
use crate::llama::{Llama, LlamaConfig};
use crate::weights::host;

/// Key of the numerator of the scale.
const ALPHA: &str = "adapter.lora.alpha";

/// An adapter file whose header has been read.
#[derive(Debug)]
pub struct GgufAdapter {
    file: GgufFile,
    architecture: &'static Architecture,
    /// Configuration of the adapter.
    pub config: AdapterConfig,
    /// Names of the factors and the rank, by the path of the layer.
    layers: BTreeMap<String, ([String; 2], Size)>,
}

impl GgufAdapter {
    /// Opens a file; the adapter's name is "default".
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = GgufFile::open(path)?;
        let architecture = config::architecture(&file)?;
        for (key, only) in [("general.type", "adapter"), ("adapter.type", "lora")] {
            match file.text(key)? {
                Some(found) if found == only => {}
                Some(found) => return Err(file.key_error(key, format!("is \"{found}\"; only \"{only}\" can be read"))),
                None => return Err(file.key_error(key, format!("is missing; it must be \"{only}\""))),
            }
        }
        // Other programs read no alpha, and one of 0, as the scale 1.
        let alpha = file.number(ALPHA)?.filter(|alpha| *alpha != 0.0);
        if let Some(alpha) = alpha.filter(|alpha| !alpha.is_finite()) {
            return Err(file.key_error(ALPHA, format!("is {alpha}; it must be a number")));
        }
        let mut layers = BTreeMap::new();
        for (name, shape, _) in file.tensors() {
            let bad = |reason: String| Err(file.tensor_error(name, reason));
            let Some((base, factor)) =
                name.rsplit_once('.').filter(|(_, factor)| ["lora_a", "lora_b"].contains(factor))
            else {
                return bad("is no factor of LoRA (.lora_a or .lora_b); only LoRA on linear layers can be read".into());
            };
            let Some(layer) = base.strip_suffix(".weight").and_then(layer_of_gguf) else {
                return bad("belongs to no layer of this model".into());
            };
            if factor == "lora_b" {
                match file.shape(&format!("{base}.lora_a")) {
                    Some(_) => continue,
                    None => return bad("has no lora_a beside it".into()),
                }
            }
            let other = format!("{base}.lora_b");
            let rank = match (shape, file.shape(&other)) {
                ([rank, _], Some([_, same])) if rank == same && *rank > 0 => *rank,
                (a, Some(b)) => return bad(format!("has the shape {a:?}, and {other} {b:?}: the ranks do not agree")),
                (_, None) => return bad("has no lora_b beside it".into()),
            };
            let scale = alpha.map_or(1.0, |alpha| alpha / rank as f64);
            layers.insert(layer, ([name.to_string(), other], Size { rank, scale }));
        }
        let Some((_, (_, first))) = layers.first_key_value() else {
            return Err(ModelError::File { path: path.into(), reason: "has no tensor: the adapter is empty".into() });
        };
        let config = AdapterConfig {
            rank: Some(first.rank),
            alpha: Some(alpha.unwrap_or(first.rank as f64)),
            scaling: Some(Scaling::Rank),
            targets: Targets::Names(layers.keys().cloned().collect()),
            ..AdapterConfig::new("lora")
        };
        Ok(Self { file, architecture, config, layers })
    }

    /// With another name, which distinguishes it from other adapters of the same model.
    pub fn named(mut self, name: &str) -> Self {
        self.config.name = name.to_string();
        self
    }

    /// Attaches the adapter to a model, in addition to existing ones. Everything but the adapter is frozen.
    pub fn attach(self, model: Llama) -> Result<(Llama, Report), ModelError> {
        let of_model = Architecture::of(model.config());
        if of_model != self.architecture {
            let reason = format!("is \"{}\", but the model's is \"{}\"", self.architecture.name, of_model.name);
            return Err(self.file.key_error(config::ARCHITECTURE, reason));
        }
        let heads = Heads::of(model.config());
        let mut tensors = BTreeMap::new();
        for (layer, ([a, b], _)) in &self.layers {
            let weight = format!("{layer}.weight");
            let read = |name: &str| -> Result<(Vec<f32>, Vec<usize>), ModelError> {
                Ok((self.file.values(name)?, self.file.shape(name).unwrap_or_default().to_vec()))
            };
            let ((a, a_shape), (mut b, b_shape)) = (read(a)?, read(b)?);
            if let Some(heads) = heads.reordered(&weight) {
                if !b_shape[0].is_multiple_of(2 * heads) {
                    let reason = format!("has {} rows; the model has {heads} heads", b_shape[0]);
                    return Err(self.file.tensor_error(&format!("{layer}.lora_b"), reason));
                }
                b = in_halves(&b, heads, b_shape[0]);
            }
            let given = [("a", TensorData::new(a, a_shape)), ("b", TensorData::new(b, b_shape))];
            tensors.insert(layer.clone(), GivenTensors::from(given.map(|(field, data)| (field.to_string(), data))));
        }
        let sizes = self.layers.iter().map(|(layer, (_, size))| (layer.clone(), *size)).collect();
        let attach = Attach::new(self.config).with_tensors(tensors).with_sizes(sizes);
        model.attach(attach).map_err(|error| self.file.of_adapter(error))
    }
}

impl GgufFile {
    /// An error of attaching, with the name of the file.
    fn of_adapter(&self, error: AdapterError) -> ModelError {
        ModelError::File { path: self.path().into(), reason: error.to_string() }
    }
}

/// Writes an adapter for a model of this configuration, from its factors, in f32.
///
/// The format has one alpha for all layers: where their scales are not the same fraction of it, the factors at the output take the
/// difference.
pub fn save_adapter_gguf(
    layers: impl Iterator<Item = Result<LayerFactors, ModelError>>,
    base: &LlamaConfig,
    name: &str,
    path: &Path,
) -> Result<(), ModelError> {
    let heads = Heads::of(base);
    let mut alpha: Option<f64> = None;
    let mut tensors = Vec::new();
    for layer in layers {
        let LayerFactors { path: layer, factors, .. } = layer?;
        let weight = format!("{layer}.weight");
        let known = to_gguf(&weight, false).filter(|name| name.starts_with("blk."));
        let Some(name) = known else {
            let reason = format!(
                "the adapter changes {layer}, which adapters of GGUF have no place for; merge it into the model"
            );
            return Err(AdapterError::Refused(reason).into());
        };
        let ([d_in, rank], [_, d_out]) = (factors.a.dims(), factors.b.dims());
        // A layer without components changes nothing.
        if rank == 0 || factors.scale == 0.0 {
            continue;
        }
        let own = factors.scale * rank as f64;
        let all = *alpha.get_or_insert(own);
        let b = if own == all { factors.b } else { factors.b.mul_scalar(own / all) };
        let a = host(factors.a.transpose());
        let mut b = host(b.transpose());
        if let Some(heads) = heads.reordered(&weight) {
            if !d_out.is_multiple_of(2 * heads) {
                let reason = format!(
                    "{layer} has {d_out} outputs; the model of --model has {heads} heads: name the model that the adapter belongs to"
                );
                return Err(AdapterError::Refused(reason).into());
            }
            b = interleaved(&b, heads, d_out);
        }
        for (field, shape, values) in [("lora_a", vec![rank, d_in], a), ("lora_b", vec![d_out, rank], b)] {
            let values = Box::new(move || Ok(values));
            tensors.push(Written { name: format!("{name}.{field}"), shape, kind: TensorType::F32, values });
        }
    }
    let Some(alpha) = alpha else {
        return Err(
            AdapterError::Refused("every layer of the adapter has rank 0: there is nothing to write".into()).into()
        );
    };
    let mut metadata = Metadata::default();
    for (key, text) in [
        (config::ARCHITECTURE, Architecture::of(base).name),
        ("general.type", "adapter"),
        ("general.name", name),
        ("adapter.type", "lora"),
    ] {
        metadata.put(key, Entry::Text(text.into()));
    }
    metadata.put(ALPHA, Entry::F32(alpha as f32));
    write(path, &metadata, tensors)
}
