//! `config.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::family::{self, Defaults};
use super::file_type::FileType;
use super::four_bit;
use super::keys::{Keys, ids};
use super::open::read_text;
use super::rope;
use crate::error::ModelError;
use crate::linear::Parameterization;
use crate::llama::{Family, LlamaConfig, MOST_LAYERS};

/// A `config.json`: the settings that the model uses, and the remaining keys, which are kept when the model is written again.
#[derive(Clone, Debug, PartialEq)]
pub struct HubConfig {
    /// Shape and constants.
    pub llama: LlamaConfig,
    /// Keys that do not change the numbers, such as `eos_token_id`.
    pub extra: Map<String, Value>,
}

impl HubConfig {
    /// Reads `config.json`, rejecting other architectures and settings.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let text = four_bit::without_account(read_text(path)?, path)?;
        Self::parse(&text).map_err(|reason| ModelError::File { path: path.to_path_buf(), reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut map: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))?;
        let family = family_of(&mut map)?;
        if let Some(method) = map.remove("quantization_config").filter(|value| !value.is_null()) {
            let method = method.get("quant_method").cloned().unwrap_or(method);
            return Err(format!(
                "quantization_config: the weights are quantised by {method}; only f32, f16 and bf16 weights can be read"
            ));
        }
        if let Some(found) = map.remove("hidden_act").filter(|found| *found != json!("silu")) {
            return Err(format!("hidden_act is {found}; only \"silu\" is supported"));
        }
        // Since version 5 `transformers` lets every token see the later ones too unless this is true.
        if let Some(found) = map.get("is_causal").filter(|found| **found != json!(true)) {
            return Err(format!(
                "is_causal is {found}; only true is supported, since tokens are predicted from those before them: remove the key, or take a causal model"
            ));
        }
        let defaults = Defaults::of(family);
        let rope = rope::Settings::take(&mut map, &defaults)?;
        let mut keys = Keys { map };
        let hidden_size = keys.count("hidden_size", None)?;
        let heads = keys.count("num_attention_heads", None)?;
        let head_dim = match (keys.present("head_dim"), defaults.head_dim) {
            (true, _) => keys.count("head_dim", None)?,
            (false, Some(usual)) => usual,
            (false, None) => LlamaConfig::default_head_dim(hidden_size, heads).map_err(|error| error.to_string())?,
        };
        let num_hidden_layers = keys.count("num_hidden_layers", None)?;
        // Before anything is said of each layer.
        if num_hidden_layers > MOST_LAYERS {
            return Err(format!("num_hidden_layers is {num_hidden_layers}; it must be from 1 to {MOST_LAYERS}"));
        }
        let llama = LlamaConfig {
            family,
            vocab_size: keys.count("vocab_size", None)?,
            hidden_size,
            intermediate_size: keys.count("intermediate_size", None)?,
            num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: match keys.map.get("num_key_value_heads") {
                // As many as query heads where the key says so.
                Some(Value::Null) => heads,
                _ => keys.count("num_key_value_heads", defaults.num_key_value_heads.or(Some(heads)))?,
            },
            head_dim,
            max_position_embeddings: keys.count("max_position_embeddings", Some(defaults.max_position_embeddings))?,
            rope_theta: match rope.theta {
                Some(theta) => theta,
                None => keys.number("rope_theta", defaults.rope_theta)?,
            },
            rope_scaling: rope.scaling,
            rms_norm_eps: keys.number("rms_norm_eps", defaults.rms_norm_eps)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", defaults.tie_word_embeddings)?,
            initializer_range: keys.number("initializer_range", 0.02)?,
            features: family::take(family, &mut keys, num_hidden_layers)?,
            parameterization: match keys.take("parameterization") {
                None => Parameterization::default(),
                Some(value) => serde_json::from_value(value.clone())
                    .map_err(|error| format!("parameterization is {value}: {error}"))?,
            },
        };
        // Taken from either place above.
        keys.map.remove("rope_theta");
        keys.map.remove("num_key_value_heads");
        family::refuse_others(family, &mut keys)?;
        llama.validate().map_err(|error| error.to_string())?;
        // Keys that describe how the file was written would be wrong for the next file.
        for stale in
            ["architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_model_name_or_path"]
        {
            keys.map.remove(stale);
        }
        for (key, _) in beyond_vocabulary(&llama) {
            if keys.map.get(key).is_some_and(Value::is_null) {
                keys.map.remove(key);
            }
        }
        Ok(Self { llama, extra: keys.map })
    }

    /// Tokens that end a generated text: those of a `generation_config.json` next to the configuration ([`Generation::ends`](super::Generation::ends)),
    /// or those under `eos_token_id` here if it names none.
    pub fn end_tokens(&self, of_generation: &[u32]) -> Vec<u32> {
        match of_generation {
            [] => self.tokens("eos_token_id"),
            ends => ends.to_vec(),
        }
    }

    /// Token ids under a key such as `eos_token_id`, which may hold one or several.
    pub fn tokens(&self, key: &str) -> Vec<u32> {
        ids(self.extra.get(key))
    }

    /// The text of `config.json` beside weights of this type.
    pub fn to_json(&self, dtype: FileType) -> String {
        let mut map = self.extra.clone();
        let Ok(Value::Object(mut fields)) = serde_json::to_value(&self.llama) else {
            unreachable!("a struct of numbers and flags is a JSON object")
        };
        fields.remove("family");
        fields.remove("features");
        map.extend(fields);
        map.extend(family::keys_of(&self.llama));
        for (key, _) in beyond_vocabulary(&self.llama) {
            map.entry(key).or_insert(Value::Null);
        }
        map.insert("model_type".into(), json!(self.llama.family.model_type()));
        map.insert("architectures".into(), json!([self.llama.family.architecture()]));
        map.insert("dtype".into(), json!(dtype.torch_name()));
        map.insert("hidden_act".into(), json!("silu"));
        format!("{:#}\n", Value::Object(map))
    }

    /// The text of `config.json`, rejected if the files of the family cannot hold the model.
    pub(super) fn checked_json(&self, dtype: FileType) -> Result<String, ModelError> {
        let text = self.to_json(dtype);
        match Self::parse(&text) {
            Ok(read) if read.llama == self.llama => Ok(text),
            Ok(_) => Err(ModelError::Config(format!(
                "files of type {} cannot hold this model: its features are {:?}",
                self.llama.family.model_type(),
                self.llama.features
            ))),
            Err(reason) => Err(ModelError::Config(reason)),
        }
    }
}

/// Ids of special tokens that Python fills in where a configuration names none, and refuses because the vocabulary is smaller.
fn beyond_vocabulary(llama: &LlamaConfig) -> impl Iterator<Item = (&'static str, usize)> {
    let smaller = llama.vocab_size;
    llama.family.default_tokens().iter().copied().filter(move |(_, id)| *id >= smaller)
}

/// Takes the family out of a configuration; other ones are rejected by name.
fn family_of(map: &mut Map<String, Value>) -> Result<Family, String> {
    let kind = map.remove("model_type").unwrap_or(Value::Null);
    let name = kind.as_str().unwrap_or_default();
    Family::of_model_type(name).ok_or_else(|| {
        let known = Family::ALL.map(Family::model_type).join(", ");
        let reason = match name.contains("moe") || name.contains("mixtral") {
            true => "mixtures of experts are not supported: ",
            false => "",
        };
        format!("model_type is {kind}; {reason}{known} can be read")
    })
}

#[cfg(test)]
mod tests {
    use super::super::generation::{GENERATION, Generation};
    use super::*;

    fn minimal() -> Map<String, Value> {
        let text = r#"{"model_type":"llama","vocab_size":10,"hidden_size":12,"intermediate_size":16,"num_hidden_layers":1,
            "num_attention_heads":3,"eos_token_id":2}"#;
        serde_json::from_str(text).unwrap()
    }

    fn parse(map: &Map<String, Value>) -> Result<HubConfig, String> {
        HubConfig::parse(&Value::Object(map.clone()).to_string())
    }

    #[test]
    fn a_number_of_layers_that_no_model_has_takes_no_time() {
        for model_type in ["llama", "qwen3", "smollm3"] {
            let mut map = minimal();
            map.insert("model_type".into(), json!(model_type));
            map.insert("num_hidden_layers".into(), json!(u64::MAX));
            assert!(parse(&map).unwrap_err().contains("num_hidden_layers is 18446744073709551615"));
        }
    }

    #[test]
    fn reads_back_what_it_writes_and_keeps_other_keys() {
        let config = parse(&minimal()).unwrap();
        assert_eq!(config.llama.head_dim, 4);
        assert_eq!(config.llama.num_key_value_heads, 3);
        assert_eq!(config.extra["eos_token_id"], 2);
        assert_eq!(HubConfig::parse(&config.to_json(FileType::F32)).unwrap(), config);
    }

    #[test]
    fn rope_theta_is_read_from_either_place() {
        let mut map = minimal();
        map.insert("rope_theta".into(), json!(5e5));
        assert_eq!(parse(&map).unwrap().llama.rope_theta, 5e5);
        let mut map = minimal();
        map.insert("rope_parameters".into(), json!({"rope_theta": 1e5, "rope_type": "default"}));
        assert_eq!(parse(&map).unwrap().llama.rope_theta, 1e5);
    }

    #[test]
    fn generation_settings_say_what_ends_a_text() {
        let dir = tempfile::tempdir().unwrap();
        let config = parse(&minimal()).unwrap();
        let ends = || Generation::read(dir.path()).map(|generation| config.end_tokens(&generation.ends));
        assert_eq!(ends().unwrap(), [2]);
        for (text, expected) in
            [(r#"{"eos_token_id": [0, 5]}"#, vec![0, 5]), (r#"{"eos_token_id": null}"#, vec![2]), ("{}", vec![2])]
        {
            std::fs::write(dir.path().join(GENERATION), text).unwrap();
            assert_eq!(ends().unwrap(), expected);
        }
        std::fs::write(dir.path().join(GENERATION), "[").unwrap();
        assert!(ends().unwrap_err().to_string().contains(GENERATION));
    }

    #[test]
    fn other_architectures_and_settings_are_refused_by_name() {
        for (key, value) in [
            ("model_type", json!("gpt2")),
            ("hidden_act", json!("gelu")),
            ("num_experts", json!(4)),
            ("sliding_window", json!(8)),
            ("is_causal", json!(false)),
            ("is_causal", Value::Null),
            ("logits_scaling", json!(2.0)),
            ("rope_scaling", json!({"type": "longrope"})),
            ("rope_parameters", json!({"rope_type": "yarn"})),
            ("hidden_size", json!("wide")),
            ("vocab_size", Value::Null),
        ] {
            let mut map = minimal();
            map.insert(key.into(), value);
            assert!(parse(&map).unwrap_err().contains(key), "{key}");
        }
    }
}
