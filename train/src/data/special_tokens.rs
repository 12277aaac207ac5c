//! Special tokens named by the files of a model folder.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::DataError;
use super::model_file::model_text;

/// Special tokens named by the files of a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    /// Keys of `tokenizer_config.json`, such as `bos_token`, with their texts.
    pub texts: Vec<(&'static str, String)>,
    /// Further named tokens, such as `image_token`, which templates may write.
    pub more: Vec<(String, String)>,
    /// Tokens with settings of their own, in the order in which a tokenizer that lacks them gets them.
    pub added: Vec<AddedToken>,
    /// True if special tokens are encoded as the text that spells them, wherever they stand.
    pub split: bool,
    /// `bos_token_id` of `config.json`.
    pub bos_id: Option<u32>,
    /// The first `eos_token_id` of `config.json`.
    pub eos_id: Option<u32>,
}

/// Name of the file with a tokenizer's settings.
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Older file with such tokens; the settings come first.
const TOKEN_MAP: &str = "special_tokens_map.json";
/// Older file with the ids of added tokens by their texts.
const ADDED_TOKENS: &str = "added_tokens.json";
/// Object of the settings with added tokens by their ids.
const ADDED: &str = "added_tokens_decoder";
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
        let texts: Vec<(&'static str, String)> = KEYS.into_iter().filter_map(text).collect();
        let added = match settings[ADDED].as_object() {
            Some(tokens) => described(tokens, &dir.join(TOKENIZER_CONFIG))?,
            None => numbered(&json_file(&dir.join(ADDED_TOKENS))?, &texts),
        };
        let id = |key: &str| {
            let value = &model[key];
            let first = value.as_array().and_then(|ids| ids.first()).unwrap_or(value);
            first.as_u64().and_then(|id| u32::try_from(id).ok())
        };
        Ok(Self {
            texts,
            more,
            added,
            split: settings["split_special_tokens"] == true,
            bos_id: id("bos_token_id"),
            eos_id: id("eos_token_id"),
        })
    }

    /// Text of a token by its key.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.texts.iter().find(|(known, _)| *known == key).map(|(_, text)| text.as_str())
    }
}

/// Added tokens with their settings, by their ids.
fn described(tokens: &Map<String, Value>, path: &Path) -> Result<Vec<AddedToken>, DataError> {
    let bad = |id: &str, problem: String| DataError::Tokenizer {
        name: path.display().to_string(),
        problem: format!("{ADDED}: {id}: {problem}"),
    };
    let mut found = Vec::with_capacity(tokens.len());
    for (id, token) in tokens {
        let number: u32 = id.parse().map_err(|_| bad(id, "is not the id of a token".into()))?;
        let mut token = token.clone();
        if let Some(settings) = token.as_object_mut() {
            // Mere names of types stand beside the settings in older files.
            settings.remove("__type");
            // As in `transformers`: a token that says nothing is not special, and is normalized unless it is special.
            let special = settings.entry("special").or_insert(Value::Bool(false)).as_bool() == Some(true);
            settings.entry("normalized").or_insert(Value::Bool(!special));
            for key in ["single_word", "lstrip", "rstrip"] {
                settings.entry(key).or_insert(Value::Bool(false));
            }
        }
        found.push((number, serde_json::from_value(token).map_err(|error| bad(id, error.to_string()))?));
    }
    found.sort_by_key(|(number, _)| *number);
    Ok(found.into_iter().map(|(_, token)| token).collect())
}

/// Added tokens of the older file: those with a name are special.
fn numbered(tokens: &Value, named: &[(&'static str, String)]) -> Vec<AddedToken> {
    let ids = tokens.as_object().into_iter().flatten();
    let mut ids: Vec<(u64, &String)> = ids.filter_map(|(text, id)| Some((id.as_u64()?, text))).collect();
    ids.sort_unstable();
    let special = |text: &String| named.iter().any(|(_, named)| named == text);
    ids.into_iter().map(|(_, text)| AddedToken::from(text.as_str(), special(text))).collect()
}

/// Reads the value in a JSON file of a model; null if there is no such file.
pub(super) fn json_file(path: &Path) -> Result<Value, DataError> {
    let Some(text) = model_text(path)? else { return Ok(Value::Null) };
    serde_json::from_str(&text)
        .map_err(|error| DataError::Template { path: path.to_path_buf(), problem: format!("not JSON: {error}") })
}
