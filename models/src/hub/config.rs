//! `config.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::open::read_text;
use super::rope;
use crate::error::ModelError;
use crate::linear::Parameterization;
use crate::llama::LlamaConfig;

/// A `config.json`: the settings that the model uses, and the remaining keys, which are kept when the model is written again.
#[derive(Clone, Debug, PartialEq)]
pub struct HubConfig {
    /// Shape and constants.
    pub llama: LlamaConfig,
    /// Keys that do not change the numbers, such as `eos_token_id`.
    pub extra: Map<String, Value>,
}

/// Name of the settings of generation.
const GENERATION: &str = "generation_config.json";

/// Settings of other architectures that would change the numbers: the key, and the only value that this model has.
fn fixed_values() -> [(&'static str, Value); 4] {
    [
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("quantization_config", Value::Null),
    ]
}

impl HubConfig {
    /// Reads `config.json`, rejecting other architectures and settings.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let text = read_text(path)?;
        Self::parse(&text).map_err(|reason| ModelError::File { path: path.to_path_buf(), reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut map: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))?;
        let kind = map.remove("model_type");
        if kind != Some(json!("llama")) {
            let found = kind.unwrap_or(Value::Null);
            return Err(format!("model_type is {found}; only \"llama\" can be read"));
        }
        for (key, expected) in fixed_values() {
            if let Some(found) = map.remove(key)
                && found != expected
            {
                return Err(format!("{key} is {found}; only {expected} is supported"));
            }
        }
        let rope = rope::Settings::take(&mut map)?;
        let mut keys = Keys { map };
        let hidden_size = keys.count("hidden_size", None)?;
        let heads = keys.count("num_attention_heads", None)?;
        let head_dim = match keys.present("head_dim") {
            true => keys.count("head_dim", None)?,
            false => LlamaConfig::default_head_dim(hidden_size, heads).map_err(|error| error.to_string())?,
        };
        let llama = LlamaConfig {
            vocab_size: keys.count("vocab_size", None)?,
            hidden_size,
            intermediate_size: keys.count("intermediate_size", None)?,
            num_hidden_layers: keys.count("num_hidden_layers", None)?,
            num_attention_heads: heads,
            num_key_value_heads: keys.count("num_key_value_heads", Some(heads))?,
            head_dim,
            max_position_embeddings: keys.count("max_position_embeddings", Some(2048))?,
            rope_theta: match rope.theta {
                Some(theta) => theta,
                None => keys.number("rope_theta", 10_000.0)?,
            },
            rope_scaling: rope.scaling,
            rms_norm_eps: keys.number("rms_norm_eps", 1e-6)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            initializer_range: keys.number("initializer_range", 0.02)?,
            parameterization: match keys.take("parameterization") {
                None => Parameterization::default(),
                Some(value) => serde_json::from_value(value.clone())
                    .map_err(|error| format!("parameterization is {value}: {error}"))?,
            },
        };
        // Taken from either place above.
        keys.map.remove("rope_theta");
        llama.validate().map_err(|error| error.to_string())?;
        // Keys that describe how the file was written would be wrong for the next file.
        for stale in
            ["architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_model_name_or_path"]
        {
            keys.map.remove(stale);
        }
        Ok(Self { llama, extra: keys.map })
    }

    /// Tokens that end a generated text: those of `generation_config.json` next to the configuration, else those under `eos_token_id` here.
    pub fn end_tokens(&self, dir: &Path) -> Result<Vec<u32>, ModelError> {
        let path = dir.join(GENERATION);
        if !path.exists() {
            return Ok(self.tokens("eos_token_id"));
        }
        let text = std::fs::read_to_string(&path).map_err(ModelError::io(&path))?;
        let bad = |reason: String| ModelError::File { path: path.clone(), reason };
        let map: Map<String, Value> =
            serde_json::from_str(&text).map_err(|error| bad(format!("not a JSON object: {error}")))?;
        match ids(map.get("eos_token_id")) {
            ends if ends.is_empty() => Ok(self.tokens("eos_token_id")),
            ends => Ok(ends),
        }
    }

    /// Token ids under a key such as `eos_token_id`, which may hold one or several.
    pub fn tokens(&self, key: &str) -> Vec<u32> {
        ids(self.extra.get(key))
    }

    /// The text of `config.json`.
    pub fn to_json(&self) -> String {
        let mut map = self.extra.clone();
        let Ok(Value::Object(fields)) = serde_json::to_value(&self.llama) else {
            unreachable!("a struct of numbers and flags is a JSON object")
        };
        map.extend(fields);
        map.insert("model_type".into(), json!("llama"));
        map.insert("architectures".into(), json!(["LlamaForCausalLM"]));
        map.insert("dtype".into(), json!("float32"));
        for (key, value) in fixed_values() {
            if value != Value::Null {
                map.insert(key.into(), value);
            }
        }
        format!("{:#}\n", Value::Object(map))
    }
}

/// Ids in a value that holds one or several.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

struct Keys {
    map: Map<String, Value>,
}

impl Keys {
    fn present(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    fn count(&mut self, key: &str, default: Option<usize>) -> Result<usize, String> {
        match (self.take(key), default) {
            (Some(value), _) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| format!("{key} is {value}; it must be a whole number")),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(format!("{key} is missing")),
        }
    }

    fn number(&mut self, key: &str, default: f64) -> Result<f64, String> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| format!("{key} is {value}; it must be a number")),
        }
    }

    fn flag(&mut self, key: &str, default: bool) -> Result<bool, String> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| format!("{key} is {value}; it must be true or false")),
        }
    }
}

#[cfg(test)]
mod tests {
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
    fn reads_back_what_it_writes_and_keeps_other_keys() {
        let config = parse(&minimal()).unwrap();
        assert_eq!(config.llama.head_dim, 4);
        assert_eq!(config.llama.num_key_value_heads, 3);
        assert_eq!(config.extra["eos_token_id"], 2);
        assert_eq!(HubConfig::parse(&config.to_json()).unwrap(), config);
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
        let ends = || config.end_tokens(dir.path());
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
            ("attention_bias", json!(true)),
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
