//! The keys of `config.json` that only some families have.

use serde_json::{Map, Value, json};

use super::keys::{Keys, whole};
use crate::llama::{Family, Features, LlamaConfig};

/// Values of keys that are not in the file, as in `transformers`.
pub(super) struct Defaults {
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub rope_theta: f64,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
}

impl Defaults {
    pub fn of(family: Family) -> Self {
        let llama = Self {
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
        };
        match family {
            Family::Llama | Family::Granite => llama,
            Family::Mistral => Self { num_key_value_heads: Some(8), max_position_embeddings: 131_072, ..llama },
            Family::Qwen2 => Self { num_key_value_heads: Some(32), max_position_embeddings: 32_768, ..llama },
            Family::Qwen3 => {
                Self { num_key_value_heads: Some(32), head_dim: Some(128), max_position_embeddings: 32_768, ..llama }
            }
            Family::SmolLm3 => Self {
                num_key_value_heads: Some(4),
                max_position_embeddings: 32_768,
                rope_theta: 2_000_000.0,
                tie_word_embeddings: true,
                ..llama
            },
            Family::Olmo2 => Self { rms_norm_eps: 1e-5, ..llama },
        }
    }
}

/// Kinds of layers under `layer_types`.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// Takes the family's keys of a model with `layers` layers.
pub(super) fn take(family: Family, keys: &mut Keys, layers: usize) -> Result<Features, String> {
    let mut features = family.features();
    match family {
        // The family has biases of queries, keys and values, whatever the key says.
        Family::Qwen2 => drop(keys.flag("attention_bias", true)?),
        Family::Mistral => {}
        Family::Llama | Family::Qwen3 | Family::SmolLm3 | Family::Olmo2 | Family::Granite => {
            let bias = keys.flag("attention_bias", false)?;
            (features.qkv_bias, features.output_bias) = (bias, bias);
        }
    }
    if [Family::Llama, Family::SmolLm3, Family::Granite].contains(&family) {
        features.mlp_bias = keys.flag("mlp_bias", false)?;
    }
    if family == Family::SmolLm3 {
        features.unrotated_layers = unrotated(keys, layers)?;
    }
    windows(family, keys, layers, &mut features)?;
    if family == Family::Granite {
        let mut other_than_one = |key: &str| {
            let value = keys.number(key, 1.0)?;
            Ok::<_, String>(if value == 1.0 { None } else { Some(value) })
        };
        features.embedding_multiplier = other_than_one("embedding_multiplier")?;
        features.residual_multiplier = other_than_one("residual_multiplier")?;
        features.logits_scaling = other_than_one("logits_scaling")?;
        features.attention_multiplier = Some(keys.number("attention_multiplier", 1.0)?);
    }
    Ok(features)
}

fn unrotated(keys: &mut Keys, layers: usize) -> Result<Vec<usize>, String> {
    let interval = keys.count("no_rope_layer_interval", Some(4))?;
    let Some(flags) = keys.of_layers("no_rope_layers", layers)? else {
        return match interval {
            0 => Err("no_rope_layer_interval is 0; it must be at least 1".into()),
            interval => Ok((0..layers).filter(|layer| (layer + 1).is_multiple_of(interval)).collect()),
        };
    };
    let mut without = Vec::new();
    for (layer, flag) in flags.iter().enumerate() {
        match flag.as_u64().or(flag.as_bool().map(u64::from)) {
            Some(1) => {}
            Some(0) => without.push(layer),
            _ => return Err(format!("no_rope_layers has {flag} for layer {layer}; 0 and 1 are known")),
        }
    }
    Ok(without)
}

/// Window of the model, and the layers that do not have it.
fn windows(family: Family, keys: &mut Keys, layers: usize, features: &mut Features) -> Result<(), String> {
    let used = match family {
        Family::Mistral => true,
        Family::Qwen2 | Family::Qwen3 | Family::SmolLm3 => keys.flag("use_sliding_window", false)?,
        // Other families have no window: a key that asks for one is found below.
        Family::Llama | Family::Olmo2 | Family::Granite => {
            keys.flag("use_sliding_window", keys.present("sliding_window"))?
        }
    };
    let default = match family {
        Family::Mistral | Family::Qwen2 | Family::Qwen3 => json!(4096),
        _ => Value::Null,
    };
    let window = keys.map.remove("sliding_window").unwrap_or(default);
    let first = keys.count("max_window_layers", Some(28))?;
    let window = match (used, window) {
        (false, _) | (true, Value::Null) => None,
        (true, value) => Some(whole("sliding_window", &value)?),
    };
    if let (Family::Llama | Family::Olmo2 | Family::Granite, Some(window)) = (family, window) {
        return Err(format!(
            "sliding_window is {window}; models of type {} have none: remove the key, or set use_sliding_window to false",
            family.model_type()
        ));
    }
    features.sliding_window = window;
    let full = |layer: &usize| match family {
        Family::Qwen2 | Family::Qwen3 => *layer < first,
        Family::SmolLm3 => features.rotates(*layer),
        _ => false,
    };
    let full_layers: Vec<usize> = (0..layers).filter(full).collect();
    features.full_layers = if window.is_some() { full_layers } else { Vec::new() };
    let Some(types) = keys.of_layers("layer_types", layers)? else { return Ok(()) };
    let mut full_layers = Vec::new();
    for (layer, kind) in types.iter().enumerate() {
        match (kind.as_str(), window) {
            (Some(FULL), _) => full_layers.push(layer),
            (Some(SLIDING), Some(_)) => {}
            (Some(SLIDING), None) => {
                return Err(format!("layer_types has {kind} for layer {layer}, but the model has no sliding_window"));
            }
            _ => {
                return Err(format!(
                    "layer_types has {kind} for layer {layer}; \"{FULL}\" and \"{SLIDING}\" are known"
                ));
            }
        }
    }
    if window.is_some() {
        // A mistral has its window in every layer: `transformers` does not read this key.
        if family == Family::Mistral && !full_layers.is_empty() {
            let layer = full_layers[0];
            return Err(format!(
                "layer_types has \"{FULL}\" for layer {layer}; every layer of a mistral has its window"
            ));
        }
        features.full_layers = full_layers;
    }
    Ok(())
}

/// Keys that would change the numbers of a model of this family but are not among its own, with the values that change nothing. They are
/// removed.
pub(super) fn refuse_others(family: Family, keys: &mut Keys) -> Result<(), String> {
    let experts = |key: &&String| key.contains("expert") || key.starts_with("moe_");
    let nothing = |value: &Value| matches!(value, Value::Null | Value::Bool(false)) || value.as_f64() == Some(0.0);
    if let Some(key) = keys.map.keys().filter(experts).find(|key| !nothing(&keys.map[*key])) {
        return Err(format!("{key} is {}; mixtures of experts are not supported", keys.map[key]));
    }
    let family = family.model_type();
    for key in ["attention_bias", "mlp_bias", "qkv_bias", "use_qk_norm", "qk_norm", "clip_qkv"] {
        if let Some(value) = keys.map.get(key).filter(|value| !nothing(value)) {
            return Err(format!("{key} is {value}; models of type {family} do not have it: remove the key"));
        }
        keys.map.remove(key);
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier", "no_rope_layers"] {
        if let Some(value) = keys.take(key) {
            return Err(format!("{key} is {value}; models of type {family} do not have it: remove the key"));
        }
    }
    for key in ["embedding_multiplier", "residual_multiplier", "logits_scaling"] {
        if let Some(value) = keys.take(key).filter(|value| value.as_f64() != Some(1.0)) {
            return Err(format!("{key} is {value}; models of type {family} do not have it: remove the key"));
        }
    }
    Ok(())
}

/// The keys of a model in the files of its family.
pub(super) fn keys_of(llama: &LlamaConfig) -> Map<String, Value> {
    let (family, layers) = (llama.family, llama.num_hidden_layers);
    let features = &llama.features;
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| drop(map.insert(key.into(), value));
    if !matches!(family, Family::Qwen2 | Family::Mistral) {
        put("attention_bias", json!(features.qkv_bias));
    }
    if matches!(family, Family::Llama | Family::SmolLm3 | Family::Granite) {
        put("mlp_bias", json!(features.mlp_bias));
    }
    match family {
        Family::Mistral => put("sliding_window", json!(features.sliding_window)),
        Family::Qwen2 | Family::Qwen3 | Family::SmolLm3 => {
            put("use_sliding_window", json!(features.sliding_window.is_some()));
            put("sliding_window", json!(features.sliding_window));
            let windowed = |layer: &usize| features.window(*layer).is_some();
            let kind = |layer| if windowed(&layer) { SLIDING } else { FULL };
            put("layer_types", (0..layers).map(kind).collect());
            if family != Family::SmolLm3 {
                put("max_window_layers", json!((0..layers).find(windowed).unwrap_or(layers)));
            }
        }
        Family::Llama | Family::Olmo2 | Family::Granite => {}
    }
    if family == Family::SmolLm3 {
        put("no_rope_layers", (0..layers).map(|layer| u8::from(features.rotates(layer))).collect());
    }
    if family == Family::Granite {
        put("embedding_multiplier", json!(features.embedding_multiplier.unwrap_or(1.0)));
        put("residual_multiplier", json!(features.residual_multiplier.unwrap_or(1.0)));
        put("logits_scaling", json!(features.logits_scaling.unwrap_or(1.0)));
        let usual = (llama.head_dim as f64).sqrt().recip();
        put("attention_multiplier", json!(features.attention_multiplier.unwrap_or(usual)));
    }
    map
}
