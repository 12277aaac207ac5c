//! Special tokens named by the files of a model folder.

use std::path::Path;

use serde_json::Value;

use super::DataError;
use super::model_file::model_text;

/// Special tokens named by the files of a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    /// Keys of `tokenizer_config.json`, such as `bos_token`, with their texts.
    pub texts: Vec<(&'static str, String)>,
    /// Further named tokens, such as `image_token`, which templates may write.
    pub more: Vec<(String, String)>,
    /// `bos_token_id` of `config.json`.
    pub bos_id: Option<u32>,
    /// The first `eos_token_id` of `config.json`.
    pub eos_id: Option<u32>,
}

/// Name of the file with a tokenizer's settings.
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Older file with such tokens; the settings come first.
const TOKEN_MAP: &str = "special_tokens_map.json";
/// Object of the settings with tokens of names of their own.
const EXTRA: &str = "extra_special_tokens";
/// Keys that name one token each.
const KEYS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl SpecialTokens {
    /// Reads those of the files that the folder has.
    pub fn read(dir: &Path) -> Result<Self, DataError> {
        let (settings, model) = (json_file(&dir.join(TOKENIZER_CONFIG))?, json_file(&dir.join("config.json"))?);
        let map = json_file(&dir.join(TOKEN_MAP))?;
        let of = |token: &Value| {
            let text = token.as_str().or(token["content"].as_str());
            text.filter(|text| !text.is_empty()).map(str::to_string)
        };
        let text = |key: &'static str| Some((key, of(&settings[key]).or_else(|| of(&map[key]))?));
        let objects = [&settings[EXTRA], &settings, &map].into_iter().filter_map(Value::as_object);
        let named = objects.flatten().filter(|(key, _)| key.ends_with("_token") && !KEYS.contains(&key.as_str()));
        let mut more: Vec<(String, String)> = Vec::new();
        for (key, token) in named.filter_map(|(key, token)| Some((key, of(token)?))) {
            if more.iter().all(|(known, _)| known != key) {
                more.push((key.clone(), token));
            }
        }
        let id = |key: &str| {
            let value = &model[key];
            let first = value.as_array().and_then(|ids| ids.first()).unwrap_or(value);
            first.as_u64().and_then(|id| u32::try_from(id).ok())
        };
        Ok(Self {
            texts: KEYS.into_iter().filter_map(text).collect(),
            more,
            bos_id: id("bos_token_id"),
            eos_id: id("eos_token_id"),
        })
    }

    /// Text of a token by its key.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.texts.iter().find(|(known, _)| *known == key).map(|(_, text)| text.as_str())
    }
}

/// Reads the value in a JSON file of a model; null if there is no such file.
pub(super) fn json_file(path: &Path) -> Result<Value, DataError> {
    let Some(text) = model_text(path)? else { return Ok(Value::Null) };
    serde_json::from_str(&text)
        .map_err(|error| DataError::Template { path: path.to_path_buf(), problem: format!("not JSON: {error}") })
}
