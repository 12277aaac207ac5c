//! The files of a tokenizer, made of the metadata.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value, json};

use super::cuts::Cut;
use super::keys::{
    ADD_BEGIN, ADD_END, ADD_SPACE, BYTE, BYTE_LEVEL, CONTROL, CUT, MERGES, MODEL, NONE, NORMAL, PIECES, SCORES,
    TEMPLATE, TEMPLATES, TOKENS, TYPES, UNKNOWN, UNUSED, USER_DEFINED, filler,
};
use super::pieces;
use crate::error::ModelError;
use crate::hub::gguf::container::GgufFile;

/// Id of a special token such as `eos`.
pub(in crate::hub::gguf) fn id_of(file: &GgufFile, name: &str) -> Result<Option<usize>, ModelError> {
    file.count(&format!("tokenizer.ggml.{name}_token_id"))
}

/// Content of the files `tokenizer.json` and `tokenizer_config.json`, by name; nothing if the file has no tokenizer.
pub(in crate::hub::gguf) fn files(file: &GgufFile) -> Result<BTreeMap<&'static str, String>, ModelError> {
    let mut files = BTreeMap::new();
    let kind = file.text(MODEL)?.unwrap_or(NONE);
    if kind == NONE {
        return Ok(files);
    }
    let tokens = file.texts(TOKENS)?.ok_or_else(|| file.key_error(TOKENS, "is missing".into()))?;
    let vocabulary = Vocabulary { types: types(file, tokens.len())?, tokens };
    let tokenizer = match kind {
        BYTE_LEVEL => byte_level(file, &vocabulary)?,
        PIECES => sentence_pieces(file, &vocabulary)?,
        other => {
            let reason = format!("is \"{other}\"; {BYTE_LEVEL} and {PIECES} can be read");
            return Err(file.key_error(MODEL, reason));
        }
    };
    files.insert("tokenizer.json", tokenizer.to_string());
    files.insert("tokenizer_config.json", settings(file, &vocabulary)?.to_string());
    Ok(files)
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i32>,
}

impl Vocabulary<'_> {
    /// Ids and texts of the tokens; rows that no token has are left out.
    fn used(&self) -> impl Iterator<Item = (usize, &str)> {
        let unused = |(id, text): &(usize, &str)| self.types[*id] == UNUSED && *text == filler(*id);
        self.tokens.iter().copied().enumerate().filter(move |token| !unused(token))
    }

    fn ids(&self) -> Map<String, Value> {
        self.used().map(|(id, text)| (text.to_string(), json!(id))).collect()
    }

    fn added(&self) -> Vec<Value> {
        let added = self.used().filter(|(id, _)| matches!(self.types[*id], UNKNOWN | CONTROL | USER_DEFINED));
        let token = |(id, text): (usize, &str)| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": self.types[id] != USER_DEFINED,
            })
        };
        added.map(token).collect()
    }
}

/// Types of the tokens: all normal where the file does not say.
fn types(file: &GgufFile, count: usize) -> Result<Vec<i32>, ModelError> {
    let Some(types) = file.numbers(TYPES)? else { return Ok(vec![NORMAL; count]) };
    if types.len() != count {
        return Err(file.key_error(TYPES, format!("has {} elements, but there are {count} tokens", types.len())));
    }
    match types.iter().find(|kind| !(f64::from(NORMAL)..=f64::from(BYTE)).contains(*kind)) {
        Some(strange) => {
            Err(file.key_error(TYPES, format!("has the type {strange}; types are from {NORMAL} to {BYTE}")))
        }
        None => Ok(types.into_iter().map(|kind| kind as i32).collect()),
    }
}

fn byte_level(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Value, ModelError> {
    let name = file.text(CUT)?.ok_or_else(|| {
        file.key_error(
            CUT,
            format!("is missing, so that the way of cutting texts is not known; it may be {}", Cut::known()),
        )
    })?;
    let cut =
        Cut::named(name).ok_or_else(|| file.key_error(CUT, format!("is \"{name}\"; {} can be read", Cut::known())))?;
    let merges = file.texts(MERGES)?.ok_or_else(|| file.key_error(MERGES, "is missing".into()))?;
    let known: HashSet<&str> = vocabulary.used().map(|(_, text)| text).collect();
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        // A byte-level alphabet has no space.
        let pair = merge.split_once(' ').filter(|(left, right)| {
            known.contains(left) && known.contains(right) && known.contains(&*format!("{left}{right}"))
        });
        let (left, right) =
            pair.ok_or_else(|| file.key_error(MERGES, format!("has \"{merge}\", which does not make a token of two")))?;
        pairs.push(json!([left, right]));
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let affixes = affixes(file, cut.adds_begin, vocabulary)?;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": cut.normalizer.map(|name| json!({"type": name})),
        "pre_tokenizer": cut.json(),
        "post_processor": affixes,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": cut.ignore_merges, "vocab": vocabulary.ids(), "merges": pairs,
        },
    }))
}

fn sentence_pieces(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Value, ModelError> {
    let count = vocabulary.tokens.len();
    let scores = file.numbers(SCORES)?.ok_or_else(|| file.key_error(SCORES, "is missing".into()))?;
    if scores.len() != count {
        return Err(file.key_error(SCORES, format!("has {} elements, but there are {count} tokens", scores.len())));
    }
    let prefix = file.flag(ADD_SPACE)?.unwrap_or(true);
    let unknown = vocabulary.types.iter().position(|kind| *kind == UNKNOWN);
    let mergeable = |id: usize| matches!(vocabulary.types[id], NORMAL | USER_DEFINED);
    let merges = pieces::merges(&vocabulary.tokens, &scores, mergeable);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": pieces::normalizer(prefix),
        "pre_tokenizer": null,
        "post_processor": affixes(file, true, vocabulary)?,
        "decoder": pieces::decoder(prefix),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| vocabulary.tokens[id]),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": vocabulary.types.contains(&BYTE), "ignore_merges": false,
            "vocab": vocabulary.ids(), "merges": merges,
        },
    }))
}

/// The post-processor that puts the beginning before, and the end behind, every text; null if there is neither.
fn affixes(file: &GgufFile, begins: bool, vocabulary: &Vocabulary) -> Result<Value, ModelError> {
    let mut special = Map::new();
    let mut item = |key: &str, usual: bool, name: &str| -> Result<Vec<Value>, ModelError> {
        if !file.flag(key)?.unwrap_or(usual) {
            return Ok(Vec::new());
        }
        let Some(text) = token(file, name, vocabulary)? else {
            let reason = format!("is true, but tokenizer.ggml.{name}_token_id is missing");
            return Err(file.key_error(key, reason));
        };
        let id = id_of(file, name)?;
        special.insert(text.into(), json!({"id": text, "ids": [id], "tokens": [text]}));
        Ok(vec![json!({"SpecialToken": {"id": text, "type_id": 0}})])
    };
    let (begin, end) = (item(ADD_BEGIN, begins, "bos")?, item(ADD_END, false, "eos")?);
    if special.is_empty() {
        return Ok(Value::Null);
    }
    let sequence = |name: &str, kind: u32| vec![json!({"Sequence": {"id": name, "type_id": kind}})];
    let single = [begin.clone(), sequence("A", 0), end.clone()].concat();
    let pair = [begin, sequence("A", 0), sequence("B", 1), end].concat();
    Ok(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}))
}

/// Text of a special token.
fn token<'a>(file: &GgufFile, name: &str, vocabulary: &Vocabulary<'a>) -> Result<Option<&'a str>, ModelError> {
    let Some(id) = id_of(file, name)? else { return Ok(None) };
    match vocabulary.tokens.get(id) {
        Some(text) => Ok(Some(text)),
        None => {
            let reason = format!("is {id}, but there are {} tokens", vocabulary.tokens.len());
            Err(file.key_error(&format!("tokenizer.ggml.{name}_token_id"), reason))
        }
    }
}

/// Content of `tokenizer_config.json`: special tokens and chat templates.
fn settings(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Value, ModelError> {
    let mut settings = Map::new();
    settings.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    settings.insert("clean_up_tokenization_spaces".into(), json!(false));
    for (key, name) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        if let Some(text) = token(file, name, vocabulary)? {
            settings.insert(key.into(), json!(text));
        }
    }
    if let Some(template) = file.text(TEMPLATE)? {
        let mut named = vec![json!({"name": "default", "template": template})];
        for name in file.texts(TEMPLATES)?.unwrap_or_default() {
            if let Some(template) = file.text(&format!("{TEMPLATE}.{name}"))? {
                named.push(json!({"name": name, "template": template}));
            }
        }
        let templates = if named.len() == 1 { json!(template) } else { json!(named) };
        settings.insert("chat_template".into(), templates);
    }
    Ok(Value::Object(settings))
}
