//! The model of a run.

use std::path::Path;

use lowrank_models::hub::gguf::is_gguf;
use lowrank_models::hub::{HubConfig, ModelFolder};
use lowrank_models::linear::{PARAMETERIZATIONS, ParameterizationEntry, ParameterizationSpec};
use lowrank_models::{Family, Features, LlamaConfig, ModelError, Parameterization};
use serde_json::{Map, Value};

use super::BuildError;
use crate::config::{ModelSection, ParameterizationSection};

/// Shape of the model in the default job: learns visibly within minutes on two cores.
fn default_shape(vocab_size: usize) -> LlamaConfig {
    LlamaConfig {
        family: Family::Llama,
        vocab_size,
        hidden_size: 256,
        intermediate_size: 688,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 64,
        max_position_embeddings: 1024,
        rope_theta: 10_000.0,
        rope_scaling: None,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        initializer_range: 0.02,
        features: Features::default(),
        parameterization: Parameterization::default(),
    }
}

/// Parameterization of the linear layers of a model of this shape, from the given options and the defaults of the others.
fn parameterization(model: &ModelSection, shape: &LlamaConfig) -> Result<Parameterization, BuildError> {
    let ParameterizationSection { name, options } = &model.parameterization;
    let mut options = options.clone();
    if let Some(rank) = usual_layer_rank(model, shape)? {
        options.insert("rank".into(), rank.into());
    }
    let parsed = entry(name)?.parse(&options);
    Ok(parsed.map_err(|error| error.under("model.parameterization.options"))?)
}

/// Rank of a parameterization that has one and is given none: a quarter of the model's width, and no more than the
/// smallest side of its layers. A fixed number would be more than small models can have.
fn usual_layer_rank(model: &ModelSection, shape: &LlamaConfig) -> Result<Option<usize>, BuildError> {
    let ParameterizationSection { name, options } = &model.parameterization;
    if entry(name)?.spec().options().get("rank").is_none() || options.contains_key("rank") {
        return Ok(None);
    }
    let smallest = shape.block_shapes().flatten().min().unwrap_or(shape.hidden_size);
    Ok(Some((shape.hidden_size / 4).min(smallest).max(1)))
}

/// Writes that rank into the section, and returns it, if one is needed and none is given.
pub fn set_usual_layer_rank(model: &mut ModelSection, shape: &LlamaConfig) -> Result<Option<usize>, BuildError> {
    let rank = usual_layer_rank(model, shape)?;
    if let Some(rank) = rank {
        model.parameterization.options.insert("rank".into(), rank.into());
    }
    Ok(rank)
}

fn entry(name: &str) -> Result<&'static ParameterizationEntry, BuildError> {
    Ok(ParameterizationEntry::find(name).map_err(ModelError::from)?)
}

/// Folder or GGUF file of a model to continue from, if the section names one rather than a shape.
pub fn model_folder(model: &ModelSection) -> Option<&Path> {
    let path = Path::new(&model.name);
    (path.join("config.json").exists() || is_gguf(path)).then_some(path)
}

/// Configuration of the model for `vocab_size` ids, with further keys for `config.json`. A folder keeps its shape.
pub fn model_config(model: &ModelSection, vocab_size: usize, separator: Option<u32>) -> Result<HubConfig, BuildError> {
    if let Some(folder) = model_folder(model) {
        let mut hub = ModelFolder::open(folder)?.config;
        let spec = entry(&model.parameterization.name)?.spec();
        let kept = match spec.starts_from_dense {
            true => ModelSection { name: String::new(), ..shapeless(model) },
            false => ModelSection::default(),
        };
        if (ModelSection { name: String::new(), ..model.clone() }) != kept {
            return Err(BuildError::Settings(format!(
                "model.name = {} is a folder with a shape of its own; remove the other model.* keys ({}, which starts from a dense model, may stay)",
                folder.display(),
                parameterizations(|spec| spec.starts_from_dense)
            )));
        }
        if spec.starts_from_dense {
            if !hub.llama.parameterization.is_dense() {
                return Err(BuildError::Settings(format!(
                    "model.parameterization.name = {} starts from a dense model; the layers of {} are {}: continue with them without that key, or run `lowrank export` first",
                    spec.name,
                    folder.display(),
                    hub.llama.parameterization.name()
                )));
            }
            hub.llama.parameterization = parameterization(model, &hub.llama)?;
            hub.llama.validate()?;
        }
        return Ok(hub);
    }
    let mut llama = match model.name.as_str() {
        "" => default_shape(vocab_size),
        name => LlamaConfig::named(name, vocab_size)?,
    };
    let reshaped = model.hidden_size.is_some() || model.num_attention_heads.is_some();
    macro_rules! take {
        ($($field:ident),*) => {$( if let Some(value) = model.$field { llama.$field = value; } )*};
    }
    take!(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, max_position_embeddings);
    take!(rope_theta, rms_norm_eps, tie_word_embeddings);
    if reshaped || model.num_key_value_heads.is_some() {
        llama.num_key_value_heads = model.num_key_value_heads.unwrap_or(llama.num_attention_heads);
    }
    match model.head_dim {
        Some(head_dim) => llama.head_dim = head_dim,
        None if reshaped => {
            llama.head_dim = LlamaConfig::default_head_dim(llama.hidden_size, llama.num_attention_heads)?
        }
        None => {}
    }
    llama.parameterization = parameterization(model, &llama)?;
    llama.validate()?;
    let extra = ["bos_token_id", "eos_token_id"].map(|key| (key.to_string(), Value::from(separator)));
    Ok(HubConfig { llama, extra: Map::from_iter(extra) })
}

/// Names of the parameterizations with a property.
pub(super) fn parameterizations(holds: fn(&ParameterizationSpec) -> bool) -> String {
    let specs = PARAMETERIZATIONS.iter().map(|entry| entry.spec());
    specs.filter(|spec| holds(spec)).map(|spec| spec.name).collect::<Vec<_>>().join(", ")
}

/// Returns the section without the keys that set a shape.
fn shapeless(model: &ModelSection) -> ModelSection {
    ModelSection {
        hidden_size: None,
        intermediate_size: None,
        num_hidden_layers: None,
        num_attention_heads: None,
        num_key_value_heads: None,
        head_dim: None,
        max_position_embeddings: None,
        rope_theta: None,
        rms_norm_eps: None,
        tie_word_embeddings: None,
        ..model.clone()
    }
}
