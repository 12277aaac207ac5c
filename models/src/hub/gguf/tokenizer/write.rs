//! The metadata of a tokenizer, made of the files of a model folder.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde_json::Value;

use super::cuts::Cut;
use super::keys::{
    ADD_BEGIN, ADD_END, ADD_SPACE, BYTE, BYTE_LEVEL, CONTROL, CUT, MERGES, MODEL, NONE, NORMAL, PIECES, SCORES,
    TEMPLATE, TEMPLATES, TOKENS, TYPES, UNKNOWN, UNUSED, USER_DEFINED, filler,
};
use super::pieces;
use crate::hub::gguf::write::{Entry, Metadata};

/// The files of a model folder that say how texts become tokens.
#[derive(Debug, Default)]
pub(in crate::hub::gguf) struct Texts {
    /// `tokenizer.json`; null without a tokenizer.
    pub tokenizer: Value,
    /// `tokenizer_config.json`.
    pub settings: Value,
    /// `config.json`.
    pub model: Value,
    /// `generation_config.json`.
    pub generation: Value,
    /// `chat_template.jinja`.
    pub template: Option<String>,
}

/// Keys of a tokenizer for an embedding of `rows` rows. Rejected: tokenizers that other programs would not read alike.
pub(in crate::hub::gguf) fn metadata(texts: &Texts, rows: usize) -> Result<Metadata, String> {
    let mut metadata = Metadata::default();
    if texts.tokenizer.is_null() {
        metadata.put(MODEL, Entry::Text(NONE.into()));
        return Ok(metadata);
    }
    let file = &texts.tokenizer;
    let model = &file["model"];
    if model["type"] != "BPE" {
        return Err(format!("the model is {}; only byte-pair encoding can be written", model["type"]));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix", "dropout"] {
        let value = &model[key];
        if !(value.is_null() || *value == "" || value.as_f64() == Some(0.0)) {
            return Err(format!("model.{key} is {value}, which GGUF has no key for"));
        }
    }
    let tokens = Tokens::read(file, rows)?;
    let merges = merges(model)?;
    let affixes = Affixes::read(&file["post_processor"])?;
    match Cut::of_json(&file["pre_tokenizer"]) {
        Some(cut) => {
            byte_level(file, cut)?;
            metadata.put(MODEL, Entry::Text(BYTE_LEVEL.into()));
            metadata.put(CUT, Entry::Text(cut.names[0].into()));
            metadata.put(TOKENS, Entry::Texts(tokens.texts.clone()));
            metadata.put(TYPES, Entry::I32s(tokens.types.clone()));
            metadata.put(MERGES, Entry::Texts(merges));
        }
        None => {
            let prefix = pieces::prefix_of(file).filter(|_| model["byte_fallback"] == true).ok_or_else(|| {
                format!(
                    "pre_tokenizer is {}, with the normalizer {}; GGUF has a name for those of {} and for SentencePiece's",
                    file["pre_tokenizer"],
                    file["normalizer"],
                    Cut::known()
                )
            })?;
            let types = tokens.of_pieces(model["unk_token"].as_str());
            metadata.put(MODEL, Entry::Text(PIECES.into()));
            metadata.put(TOKENS, Entry::Texts(tokens.texts.clone()));
            metadata.put(SCORES, Entry::F32s(pieces::scores(&tokens.texts, &merges)));
            metadata.put(TYPES, Entry::I32s(types));
            metadata.put(ADD_SPACE, Entry::Flag(prefix));
        }
    }
    special(texts, &tokens, &affixes, &mut metadata)?;
    templates(texts, &mut metadata)?;
    Ok(metadata)
}

/// Rejects what a name of a way of cutting does not say.
fn byte_level(file: &Value, cut: &Cut) -> Result<(), String> {
    let (name, model) = (cut.names[0], &file["model"]);
    let whole = model["ignore_merges"].as_bool().unwrap_or(false);
    if whole != cut.ignore_merges {
        return Err(format!(
            "model.ignore_merges is {whole}; other programs would take {} for {name}",
            cut.ignore_merges
        ));
    }
    if model["byte_fallback"] == true {
        return Err(format!("model.byte_fallback is true, which does not go with {name}"));
    }
    let normalizer = &file["normalizer"];
    if !(normalizer.is_null() || cut.normalizer.is_some_and(|usual| normalizer["type"] == usual)) {
        return Err(format!("normalizer is {normalizer}, which GGUF has no key for"));
    }
    match &file["decoder"]["type"] {
        kind if *kind == "ByteLevel" => Ok(()),
        _ => Err(format!("decoder is {}; only ByteLevel goes with {name}", file["decoder"])),
    }
}

/// The tokens, one for each row of the embedding.
struct Tokens {
    texts: Vec<String>,
    types: Vec<i32>,
}

impl Tokens {
    fn read(file: &Value, rows: usize) -> Result<Self, String> {
        let mut found: BTreeMap<usize, (String, i32)> = BTreeMap::new();
        let vocabulary = file["model"]["vocab"].as_object().ok_or("model.vocab is missing")?;
        let id = |value: &Value, text: &str| {
            let id = value.as_u64().and_then(|id| usize::try_from(id).ok());
            match id {
                Some(id) if id < rows => Ok(id),
                _ => Err(format!("the token \"{text}\" has the id {value}; the embedding has {rows} rows")),
            }
        };
        for (text, value) in vocabulary {
            let id = id(value, text)?;
            if let Some((other, _)) = found.insert(id, (text.clone(), NORMAL)) {
                return Err(format!("the tokens \"{other}\" and \"{text}\" both have the id {id}"));
            }
        }
        for added in file["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().ok_or("a token of added_tokens has no content")?;
            let id = id(&added["id"], text)?;
            if let Some(flag) = ["single_word", "lstrip", "rstrip"].into_iter().find(|flag| added[flag] == true) {
                return Err(format!("the added token \"{text}\" has {flag}, which GGUF has no key for"));
            }
            let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
            if let Some((other, _)) = found.insert(id, (text.to_string(), kind))
                && other != text
            {
                return Err(format!("the tokens \"{other}\" and \"{text}\" both have the id {id}"));
            }
        }
        let known: HashSet<&str> = found.values().map(|(text, _)| text.as_str()).collect();
        if known.len() < found.len() {
            return Err("two ids have the same token".into());
        }
        let spare = |id: usize| {
            let mut text = filler(id);
            while known.contains(text.as_str()) {
                text.push('_');
            }
            (text, UNUSED)
        };
        let all = (0..rows).map(|id| found.get(&id).cloned().unwrap_or_else(|| spare(id)));
        let (texts, types) = all.unzip();
        Ok(Self { texts, types })
    }

    fn id(&self, text: &str) -> Option<usize> {
        self.texts.iter().position(|known| known == text)
    }

    /// Types of SentencePiece's tokens: bytes, and the unknown one.
    fn of_pieces(&self, unknown: Option<&str>) -> Vec<i32> {
        let byte = |text: &str| {
            let digits = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
            digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
        };
        let kind = |(text, kind): (&String, &i32)| match kind {
            _ if unknown == Some(text.as_str()) => UNKNOWN,
            &NORMAL if byte(text) => BYTE,
            other => *other,
        };
        self.texts.iter().zip(&self.types).map(kind).collect()
    }
}

fn merges(model: &Value) -> Result<Vec<String>, String> {
    let merges = model["merges"].as_array().ok_or("model.merges is missing")?;
    let text = |merge: &Value| match merge {
        Value::String(text) => Some(text.clone()),
        Value::Array(pair) => match pair.as_slice() {
            [left, right] => {
                let pair = [left.as_str()?, right.as_str()?];
                pair.iter().all(|part| !part.contains(' ')).then(|| pair.join(" "))
            }
            _ => None,
        },
        _ => None,
    };
    merges.iter().map(|merge| text(merge).ok_or_else(|| format!("model.merges has {merge}"))).collect()
}

/// Tokens that the post-processor puts around a text.
struct Affixes {
    begin: Option<String>,
    end: Option<String>,
}

impl Affixes {
    fn read(processor: &Value) -> Result<Self, String> {
        let mut affixes = Self { begin: None, end: None };
        match processor["type"].as_str() {
            None | Some("ByteLevel") => {}
            Some("Sequence") => {
                for inner in processor["processors"].as_array().into_iter().flatten() {
                    let inner = Self::read(inner)?;
                    affixes = Self { begin: affixes.begin.or(inner.begin), end: affixes.end.or(inner.end) };
                }
            }
            Some("TemplateProcessing") => {
                let single = processor["single"].as_array().ok_or("post_processor.single is missing")?;
                let text = |item: &Value| item["SpecialToken"]["id"].as_str().map(str::to_string);
                let body = single.iter().position(|item| item["Sequence"].is_object());
                let body = body.ok_or("post_processor.single has no text")?;
                let (before, after) = (&single[..body], &single[body + 1..]);
                if before.len() > 1 || after.len() > 1 {
                    return Err(
                        "post_processor puts several tokens before or behind a text; GGUF has keys for one".into()
                    );
                }
                affixes = Self { begin: before.first().and_then(text), end: after.first().and_then(text) };
            }
            Some(other) => return Err(format!("post_processor is {other}, which GGUF has no key for")),
        }
        Ok(affixes)
    }
}

/// Ids of special tokens, and which of them are put around texts.
fn special(texts: &Texts, tokens: &Tokens, affixes: &Affixes, metadata: &mut Metadata) -> Result<(), String> {
    let named = |key: &str| {
        let token = &texts.settings[key];
        token.as_str().or(token["content"].as_str()).and_then(|text| tokens.id(text))
    };
    let ids = |value: &Value| -> Vec<usize> {
        let one = |value: &Value| value.as_u64().map(|id| id as usize).filter(|id| *id < tokens.texts.len());
        match value {
            Value::Array(values) => values.iter().filter_map(one).collect(),
            value => one(value).into_iter().collect(),
        }
    };
    let of_model = |key: &str| ids(&texts.model[key]).first().copied();
    let affix = |text: &Option<String>| text.as_ref().and_then(|text| tokens.id(text));
    let ends = match ids(&texts.generation["eos_token_id"]) {
        ends if ends.is_empty() => ids(&texts.model["eos_token_id"]),
        ends => ends,
    };
    let end = affix(&affixes.end).or(named("eos_token")).or(ends.first().copied());
    let Some(end) = end else {
        return Err("names no token that ends a text; set eos_token in tokenizer_config.json".into());
    };
    let begin = affix(&affixes.begin).or(named("bos_token")).or(of_model("bos_token_id"));
    let mut put =
        |name: &str, id: usize| metadata.put(&format!("tokenizer.ggml.{name}_token_id"), Entry::U32(id as u32));
    put("bos", begin.unwrap_or(end));
    put("eos", end);
    // Further tokens that end an answer; the format has keys for two.
    let others: BTreeSet<usize> = ends.into_iter().filter(|id| *id != end).collect();
    if others.len() > 2 {
        return Err(format!("{} tokens end a text; GGUF has keys for three", others.len() + 1));
    }
    for (name, id) in ["eot", "eom"].into_iter().zip(others) {
        put(name, id);
    }
    if let Some(id) = named("unk_token") {
        put("unknown", id);
    }
    if let Some(id) = named("pad_token").or(of_model("pad_token_id")) {
        put("padding", id);
    }
    metadata.put(ADD_BEGIN, Entry::Flag(affixes.begin.is_some()));
    metadata.put(ADD_END, Entry::Flag(affixes.end.is_some()));
    Ok(())
}

/// Chat templates: the plain one, and others under their names.
fn templates(texts: &Texts, metadata: &mut Metadata) -> Result<(), String> {
    let named = match (&texts.template, &texts.settings["chat_template"]) {
        (Some(template), _) => vec![("default", template.as_str())],
        (None, Value::String(template)) => vec![("default", template.as_str())],
        (None, Value::Array(all)) => {
            let all = all.iter().map(|template| {
                let name = template["name"].as_str().zip(template["template"].as_str());
                name.ok_or("chat_template in tokenizer_config.json has one without name or text")
            });
            all.collect::<Result<_, _>>()?
        }
        _ => Vec::new(),
    };
    let others: Vec<String> = named.iter().map(|(name, _)| name.to_string()).filter(|name| name != "default").collect();
    if !others.is_empty() {
        metadata.put(TEMPLATES, Entry::Texts(others));
    }
    for (name, template) in named {
        let key = if name == "default" { TEMPLATE.to_string() } else { format!("{TEMPLATE}.{name}") };
        metadata.put(&key, Entry::Text(template.into()));
    }
    Ok(())
}
