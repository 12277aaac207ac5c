//! Configuration of a model in the metadata.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::architecture::Architecture;
use super::container::GgufFile;
use super::rope;
use super::tokenizer::id_of;
use super::write::{Entry, Metadata};
use crate::error::ModelError;
use crate::hub::HubConfig;
use crate::linear::Parameterization;
use crate::llama::{Family, Features, LlamaConfig, RopeScaling};

/// Key of the architecture, which is also the prefix of the model's keys.
pub(super) const ARCHITECTURE: &str = "general.architecture";
/// Tensors that decide on the shape.
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";
/// Granite's multipliers.
const EMBEDDING_SCALE: &str = "embedding_scale";
const RESIDUAL_SCALE: &str = "residual_scale";
const LOGIT_SCALE: &str = "logit_scale";
const ATTENTION_SCALE: &str = "attention.scale";

/// Keys of the model, each asked for once; those that nobody asked for are rejected.
struct Keys<'a> {
    file: &'a GgufFile,
    architecture: &'static Architecture,
    asked: BTreeSet<String>,
}

impl Keys<'_> {
    /// Name of a key in the file.
    fn path(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    fn key(&mut self, name: &str) -> String {
        let key = self.path(name);
        self.asked.insert(key.clone());
        key
    }

    fn count(&mut self, name: &str) -> Result<Option<usize>, ModelError> {
        let key = self.key(name);
        self.file.count(&key)
    }

    fn needed(&mut self, name: &str) -> Result<usize, ModelError> {
        let key = self.key(name);
        self.file.count(&key)?.ok_or_else(|| self.file.key_error(&key, "is missing".into()))
    }

    fn number(&mut self, name: &str) -> Result<Option<f64>, ModelError> {
        let key = self.key(name);
        self.file.number(&key)
    }

    /// A number that may only have one value, because the model has no other.
    fn fixed(&mut self, name: &str, only: f64) -> Result<(), ModelError> {
        let key = self.key(name);
        match self.file.number(&key)? {
            Some(number) if number != only => {
                Err(self.file.key_error(&key, format!("is {number}; only {only} is supported")))
            }
            _ => Ok(()),
        }
    }

    /// Rejects keys of the model that were not asked for: they may change its numbers.
    fn finish(self) -> Result<(), ModelError> {
        let prefix = self.path("");
        match self.file.keys().find(|key| key.starts_with(&prefix) && !self.asked.contains(*key)) {
            Some(key) => Err(self.file.key_error(key, "is a setting of the model that is not known".into())),
            None => Ok(()),
        }
    }
}

/// The architecture of a file.
pub(super) fn architecture(file: &GgufFile) -> Result<&'static Architecture, ModelError> {
    let name = file.text(ARCHITECTURE)?.ok_or_else(|| file.key_error(ARCHITECTURE, "is missing".into()))?;
    Architecture::named(name)
        .ok_or_else(|| file.key_error(ARCHITECTURE, format!("is \"{name}\"; {} can be read", Architecture::known())))
}

/// Reads the configuration of a model.
pub(super) fn read(file: &GgufFile) -> Result<HubConfig, ModelError> {
    let architecture = architecture(file)?;
    if let Some(kind) = file.text("general.type")?
        && kind != "model"
    {
        return Err(file.key_error(
            "general.type",
            format!("is \"{kind}\"; name the file of a model, and that of an adapter with --adapter"),
        ));
    }
    if let Some(parts) = file.count("split.count")?
        && parts > 1
    {
        let reason =
            format!("is {parts}: the model is split over files; let llama.cpp join them (llama-gguf-split --merge)");
        return Err(file.key_error("split.count", reason));
    }
    let mut keys = Keys { file, architecture, asked: BTreeSet::new() };
    keys.fixed("expert_count", 0.0)?;
    keys.fixed("expert_used_count", 0.0)?;
    let (hidden_size, heads) = (keys.needed("embedding_length")?, keys.needed("attention.head_count")?);
    let head_dim = match keys.count("attention.key_length")? {
        Some(width) => width,
        None => LlamaConfig::default_head_dim(hidden_size, heads)
            .map_err(|error| file.key_error(&keys.path("attention.head_count"), error.to_string()))?,
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        keys.fixed(name, head_dim as f64)?;
    }
    let rope_theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    let rope_scaling = scaling(&mut keys, head_dim, rope_theta)?;
    let vocab_size = vocabulary(&mut keys)?;
    let num_hidden_layers = keys.needed("block_count")?;
    let features = features(&mut keys, num_hidden_layers, head_dim)?;
    let llama = LlamaConfig {
        family: architecture.family,
        vocab_size,
        hidden_size,
        intermediate_size: keys.needed("feed_forward_length")?,
        num_hidden_layers,
        num_attention_heads: heads,
        num_key_value_heads: keys.count("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        max_position_embeddings: keys.needed("context_length")?,
        rope_theta,
        rope_scaling,
        rms_norm_eps: match keys.number("attention.layer_norm_rms_epsilon")? {
            Some(eps) => eps,
            None => return Err(file.key_error(&keys.path("attention.layer_norm_rms_epsilon"), "is missing".into())),
        },
        tie_word_embeddings: file.shape(HEAD).is_none(),
        initializer_range: 0.02,
        features,
        parameterization: Parameterization::default(),
    };
    keys.finish()?;
    llama.validate().map_err(|error| ModelError::File { path: file.path().into(), reason: error.to_string() })?;
    Ok(HubConfig { llama, extra: special_ids(file)? })
}

/// Number of token ids: the rows of the embedding, which the metadata must agree with.
fn vocabulary(keys: &mut Keys) -> Result<usize, ModelError> {
    let file = keys.file;
    let Some(rows) = file.shape(EMBEDDING).and_then(|shape| shape.first().copied()) else {
        return Err(file.tensor_error(EMBEDDING, "is missing".into()));
    };
    match keys.count("vocab_size")? {
        Some(count) if count != rows => {
            let reason = format!("is {count}, but {EMBEDDING} has {rows} rows");
            Err(file.key_error(&keys.path("vocab_size"), reason))
        }
        _ => Ok(rows),
    }
}

fn scaling(keys: &mut Keys, head_dim: usize, theta: f64) -> Result<Option<RopeScaling>, ModelError> {
    let file = keys.file;
    let key = keys.key("rope.scaling.type");
    let kind = file.text(&key)?.unwrap_or("none").to_string();
    let original = keys.count("rope.scaling.original_context_length")?;
    let factor = keys.number("rope.scaling.factor")?;
    // A note on the origin of the weights, and a scale that only other kinds use.
    keys.key("rope.scaling.finetuned");
    let attention_factor = keys.number("rope.scaling.attn_factor")?;
    let beta_fast = keys.number("rope.scaling.yarn_beta_fast")?;
    let beta_slow = keys.number("rope.scaling.yarn_beta_slow")?;
    let of_tensor = rope::of_divisors(file, head_dim, theta, original)?;
    let needed = |value: Option<f64>, name: &str| {
        value.ok_or_else(|| file.key_error(&keys.path(&format!("rope.scaling.{name}")), "is missing".into()))
    };
    let by_keys = match kind.as_str() {
        "none" => None,
        "linear" => Some(RopeScaling::Linear { factor: needed(factor, "factor")? }),
        "yarn" => Some(RopeScaling::Yarn {
            factor: needed(factor, "factor")?,
            original_max_position_embeddings: needed(
                original.map(|original| original as f64),
                "original_context_length",
            )?,
            // A factor beside the one that follows from the scaling.
            attention_factor: match attention_factor.filter(|factor| *factor != 1.0) {
                None => None,
                Some(times) => {
                    let usual = 0.1 * needed(factor, "factor")?.ln() + 1.0;
                    Some(times * usual)
                }
            },
            beta_fast,
            beta_slow,
            mscale: None,
            mscale_all_dim: None,
            truncate: None,
        }),
        other => {
            return Err(file.key_error(&key, format!("is \"{other}\"; none, linear and yarn can be read")));
        }
    };
    match (by_keys, of_tensor) {
        (Some(_), Some(_)) => {
            Err(file.key_error(&key, format!("is \"{kind}\", and {} scales the angles as well", rope::DIVISORS)))
        }
        (by_keys, of_tensor) => Ok(by_keys.or(of_tensor)),
    }
}

/// Parts beyond a plain LLaMA: those of the architecture, biases that have tensors, and Granite's multipliers.
fn features(keys: &mut Keys, layers: usize, head_dim: usize) -> Result<Features, ModelError> {
    let (file, architecture) = (keys.file, keys.architecture);
    let mut features = Features { unrotated_layers: architecture.unrotated(layers), ..architecture.family.features() };
    if architecture.optional_parts {
        let present = |layer: &str| file.shape(&format!("blk.0.{layer}.bias")).is_some();
        features.qkv_bias = present("attn_q");
        features.output_bias = present("attn_output");
        features.mlp_bias = present("ffn_gate");
        // A folder has one key for both.
        if features.qkv_bias != features.output_bias {
            let reason = format!(
                "{}; models of type {} have biases of queries, keys, values and the output, or none of them",
                if features.qkv_bias { "is missing" } else { "stands alone" },
                architecture.family.model_type()
            );
            return Err(file.tensor_error("blk.0.attn_output.bias", reason));
        }
    }
    if architecture.family == Family::Granite {
        let mut other_than_one = |name: &str| {
            // A scale of 0 is none.
            let value = keys.number(name)?.filter(|value| *value != 0.0 && *value != 1.0);
            Ok::<_, ModelError>(value)
        };
        features.embedding_multiplier = other_than_one(EMBEDDING_SCALE)?;
        features.residual_multiplier = other_than_one(RESIDUAL_SCALE)?;
        features.logits_scaling = other_than_one(LOGIT_SCALE)?;
        let scale = keys.number(ATTENTION_SCALE)?.filter(|value| *value != 0.0);
        features.attention_multiplier = Some(scale.unwrap_or((head_dim as f64).sqrt().recip()));
    }
    Ok(features)
}

/// Special tokens under their keys of `config.json`.
fn special_ids(file: &GgufFile) -> Result<Map<String, Value>, ModelError> {
    let mut extra = Map::new();
    for (key, name) in [("bos_token_id", "bos"), ("pad_token_id", "padding")] {
        if let Some(id) = id_of(file, name)? {
            extra.insert(key.into(), json!(id));
        }
    }
    let mut ends = Vec::new();
    for name in ["eos", "eot", "eom"] {
        ends.extend(id_of(file, name)?.filter(|id| !ends.contains(id)));
    }
    match ends.as_slice() {
        [] => {}
        [end] => drop(extra.insert("eos_token_id".into(), json!(end))),
        ends => drop(extra.insert("eos_token_id".into(), json!(ends))),
    }
    Ok(extra)
}

/// Keys of the model.
pub(super) fn write(config: &LlamaConfig, metadata: &mut Metadata) -> Result<(), ModelError> {
    let prefix = Architecture::of(config).name;
    let mut put = |name: &str, value: Entry| metadata.put(&format!("{prefix}.{name}"), value);
    let count = |value: usize| Entry::U32(value as u32);
    put("block_count", count(config.num_hidden_layers));
    put("context_length", count(config.max_position_embeddings));
    put("embedding_length", count(config.hidden_size));
    put("feed_forward_length", count(config.intermediate_size));
    put("attention.head_count", count(config.num_attention_heads));
    put("attention.head_count_kv", count(config.num_key_value_heads));
    put("attention.key_length", count(config.head_dim));
    put("attention.value_length", count(config.head_dim));
    put("attention.layer_norm_rms_epsilon", Entry::F32(config.rms_norm_eps as f32));
    put("rope.dimension_count", count(config.head_dim));
    put("rope.freq_base", Entry::F32(config.rope_theta as f32));
    put("vocab_size", count(config.vocab_size));
    if config.family == Family::Granite {
        let features = &config.features;
        let usual = (config.head_dim as f64).sqrt().recip();
        for (name, value) in [
            (EMBEDDING_SCALE, features.embedding_multiplier.unwrap_or(1.0)),
            (RESIDUAL_SCALE, features.residual_multiplier.unwrap_or(1.0)),
            (LOGIT_SCALE, features.logits_scaling.unwrap_or(1.0)),
            (ATTENTION_SCALE, features.attention_multiplier.unwrap_or(usual)),
        ] {
            put(name, Entry::F32(value as f32));
        }
    }
    match &config.rope_scaling {
        None => {}
        // In the tensor of divisors; the number is none of llama.cpp's, it restores the setting here.
        Some(RopeScaling::Llama3 { original_max_position_embeddings: original, .. }) => {
            put("rope.scaling.original_context_length", count(*original as usize));
        }
        Some(RopeScaling::Linear { factor }) => {
            put("rope.scaling.type", Entry::Text("linear".into()));
            put("rope.scaling.factor", Entry::F32(*factor as f32));
        }
        Some(
            yarn @ RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast,
                beta_slow,
                truncate,
                ..
            },
        ) => {
            if *truncate == Some(false) {
                return Err(ModelError::Config(
                    "rope_scaling.truncate is false; GGUF has no such setting, so that other programs would compute other angles".into(),
                ));
            }
            put("rope.scaling.type", Entry::Text("yarn".into()));
            put("rope.scaling.factor", Entry::F32(*factor as f32));
            put("rope.scaling.original_context_length", count(*original as usize));
            let times = yarn.attention_factor() / (0.1 * factor.ln() + 1.0);
            if (times - 1.0).abs() > 1e-6 {
                put("rope.scaling.attn_factor", Entry::F32(times as f32));
            }
            for (name, beta) in [("yarn_beta_fast", beta_fast), ("yarn_beta_slow", beta_slow)] {
                if let Some(beta) = beta {
                    put(&format!("rope.scaling.{name}"), Entry::F32(*beta as f32));
                }
            }
        }
        Some(RopeScaling::Dynamic { .. }) => {
            return Err(ModelError::Config(
                "rope_scaling is dynamic, which GGUF has no setting for; remove it to write the model as it is up to its positions".into(),
            ));
        }
    }
    Ok(())
}
