//! Conversion between text and token ids.

mod claims;
mod windows;

use std::ops::Range;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::processors::sequence::Sequence;
use tokenizers::{AddedToken, TokenizerBuilder, TokenizerImpl};

use super::model_file::model_file;
use super::special_tokens::{SpecialTokens, TOKENIZER_CONFIG};
use super::{DataError, Document};
use crate::process::files::write_whole;

/// A tokenizer: byte level, trained here, or any `tokenizer.json`.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    name: String,
    /// Tokens that its post-processor adds before and after a text.
    begin: Vec<u32>,
    end: Vec<u32>,
    separator: Option<u32>,
    eos: Option<u32>,
    /// True if special tokens in prompts and templates are encoded as the text that spells them.
    split: bool,
}

/// Ids, each with its byte range in the text; the range of added tokens is empty.
pub(super) type Spans = Vec<(u32, Range<usize>)>;

/// Special token at the start of every document.
const SEPARATOR: &str = "<|endoftext|>";

/// Candidates for the token at the start of a document if neither the tokenizer nor the files next to it name one; the
/// first that exists is used.
const SEPARATORS: [&str; 6] = [SEPARATOR, "<s>", "<|begin_of_text|>", "<|im_start|>", "</s>", "[CLS]"];

/// Files of tokenizers in other formats.
const OTHER_FILES: [&str; 3] = ["tokenizer.model", "spiece.model", "vocab.json"];

type BytePair = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

impl Tokenizer {
    /// Creates a byte-level tokenizer: one token per byte, with the byte as id, and the separator as id 256.
    pub fn bytes() -> Result<Self, DataError> {
        let vocabulary: Vocab = (0..=255u8).map(|byte| (byte_character(byte).to_string(), u32::from(byte))).collect();
        let model = BPE::builder().vocab_and_merges(vocabulary, Vec::new()).build();
        let model = model.map_err(|error| failure("bytes", error))?;
        let mut tokenizer = byte_pair(model)?;
        tokenizer.add_special_tokens([separator_token()]).map_err(|error| failure("bytes", error))?;
        Self::new(tokenizer.into(), "bytes".into(), &SpecialTokens::default())?.for_documents()
    }

    /// Reads a `tokenizer.json`, with the special tokens named by the files next to it. Its truncation and padding
    /// settings are not applied: documents keep their length.
    pub fn from_file(path: &Path) -> Result<Self, DataError> {
        let name = path.display().to_string();
        let other = OTHER_FILES.iter().find(|file| path.with_file_name(file).exists());
        if let (false, Some(other)) = (path.exists(), other) {
            let problem = format!(
                "is missing; the folder has {other}: let transformers convert it by AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            );
            return Err(DataError::Tokenizer { name, problem });
        }
        let Some(bytes) = model_file(path)? else {
            if path.parent().is_some_and(Path::is_file) {
                let problem = "the model's file holds no tokenizer; convert the model again, with its tokenizer".into();
                return Err(DataError::Tokenizer { name, problem });
            }
            let missing = std::fs::metadata(path).err().unwrap_or_else(|| std::io::ErrorKind::NotFound.into());
            return Err(DataError::read(path)(missing));
        };
        claims::check(&bytes).map_err(|problem| DataError::Tokenizer { name: name.clone(), problem })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| failure(&name, error))?;
        inner.with_padding(None).with_truncation(None).map_err(|error| failure(&name, error))?;
        let named = SpecialTokens::read(path.parent().unwrap_or(Path::new("")))?;
        let stated = |text: &&str| named.added.iter().any(|token| token.content == *text);
        let added = |text: &&str| !stated(text) && !inner.get_added_vocabulary().is_special_token(text);
        let missing: Vec<AddedToken> = named
            .texts
            .iter()
            .map(|(_, text)| text.as_str())
            .filter(added)
            .map(|text| AddedToken::from(text, true))
            .collect();
        inner.add_tokens(named.added.clone()).map_err(|error| failure(&name, error))?;
        inner.add_special_tokens(missing).map_err(|error| failure(&name, error))?;
        Self::new(inner, name, &named)
    }

    /// Trains byte-level byte-pair encoding with `vocab_size` ids, including the 256 bytes and the separator.
    ///
    /// "Neural Machine Translation of Rare Words with Subword Units" (arXiv 1508.07909). Results in fewer ids if the
    /// text has no more pairs.
    pub fn train(
        documents: impl Iterator<Item = Result<Document, DataError>> + Send,
        vocab_size: usize,
    ) -> Result<Self, DataError> {
        if vocab_size < 257 {
            return Err(DataError::Setting {
                key: "tokenizer.vocab_size",
                value: vocab_size.to_string(),
                problem: "must be at least 257: the 256 bytes and the separator".into(),
            });
        }
        let mut tokenizer = byte_pair(BPE::default())?;
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![separator_token()])
            .build();
        let mut refused = None;
        // The trainer accepts only texts: an error ends them and is reported afterwards.
        let texts = documents.map_while(|document| match document {
            Ok(document) => Some(document.text),
            Err(error) => {
                refused = Some(error);
                None
            }
        });
        tokenizer.train(&mut trainer, texts).map_err(|error| failure("training", error))?;
        match refused {
            Some(error) => Err(error),
            None => {
                Self::new(tokenizer.into(), "trained on the data".into(), &SpecialTokens::default())?.for_documents()
            }
        }
    }

    fn new(mut inner: tokenizers::Tokenizer, name: String, named: &SpecialTokens) -> Result<Self, DataError> {
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some_and(|probability| probability > 0.0)
        {
            let problem = "drops merges at random, so that the same text gives other tokens; set `dropout` to null";
            return Err(DataError::Tokenizer { name, problem: problem.into() });
        }
        // Text that spells a special token is plain text: it must not start a document.
        inner.set_encode_special_tokens(true);
        let (begin, end) = affixes(&inner).map_err(|error| failure(&name, error))?;
        let id = |key: &str| named.text(key).and_then(|text| inner.token_to_id(text));
        let eos = id("eos_token").or(named.eos_id);
        let usual = || SEPARATORS.iter().find_map(|token| inner.token_to_id(token));
        let separator = begin.first().copied().or(id("bos_token")).or(named.bos_id).or(eos).or_else(usual);
        Ok(Self {
            separator: separator.filter(|id| inner.id_to_token(*id).is_some()),
            eos,
            split: named.split,
            inner,
            name,
            begin,
            end,
        })
    }

    /// Returns the same tokenizer with a post-processor that adds the separator before every text, as in training
    /// documents.
    ///
    /// # Errors
    /// No special token can be the separator.
    pub fn for_documents(mut self) -> Result<Self, DataError> {
        let separator = self.separator.ok_or_else(|| DataError::Tokenizer {
            name: self.name.clone(),
            problem: format!(
                "names no token that texts begin or end with, and has none of {}; one must mark where documents begin: set bos_token in tokenizer_config.json",
                SEPARATORS.join(" ")
            ),
        })?;
        if self.begin.first() == Some(&separator) {
            return Ok(self);
        }
        let token = self.inner.id_to_token(separator).unwrap_or_default();
        let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let sequence = |id: &str, kind: u32| json!({"Sequence": {"id": id, "type_id": kind}});
        let template = json!({
            "type": "TemplateProcessing",
            "single": [special, sequence("A", 0)],
            "pair": [special, sequence("A", 0), sequence("B", 1)],
            "special_tokens": {token.clone(): {"id": token, "ids": [separator], "tokens": [token]}},
        });
        let template: PostProcessorWrapper =
            serde_json::from_value(template).map_err(|error| failure(&self.name, error.into()))?;
        let processor = match self.inner.get_post_processor().cloned() {
            None => template,
            Some(before) => PostProcessorWrapper::Sequence(Sequence::new(vec![before, template])),
        };
        self.inner.with_post_processor(Some(processor));
        self.begin.insert(0, separator);
        Ok(self)
    }

    /// Returns the same tokenizer for texts in which special tokens are recognised, as in prompts and chat templates,
    /// unless the files next to it say `split_special_tokens`.
    pub fn with_special_tokens(&self) -> Self {
        let mut tokenizer = self.clone();
        tokenizer.inner.set_encode_special_tokens(self.split);
        tokenizer
    }

    /// Ids of a text, without added tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        if text.len() <= windows::AT_ONCE {
            let encoding = self.inner.encode_fast(text, false).map_err(|error| failure(&self.name, error))?;
            return Ok(encoding.get_ids().to_vec());
        }
        let mut ids = Vec::new();
        windows::encode(
            text,
            |part| self.spans_at_once(part),
            |tokens| {
                ids.extend(tokens.into_iter().map(|(id, _)| id));
                true
            },
        )?;
        Ok(ids)
    }

    /// Encodes as [`Tokenizer::encode`] in parts: the ids of a long text are never all in memory.
    pub(super) fn encode_in_parts(
        &self,
        text: &str,
        mut each: impl FnMut(&[u32]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let mut done = Ok(());
        windows::encode(
            text,
            |part| self.spans_at_once(part),
            |tokens| {
                let ids: Vec<u32> = tokens.into_iter().map(|(id, _)| id).collect();
                done = each(&ids);
                done.is_ok()
            },
        )?;
        done
    }

    /// Ids of a text including the tokens that the post-processor adds, as a model input.
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok([self.begin.clone(), self.encode(text)?, self.end.clone()].concat())
    }

    /// Encodes as [`Tokenizer::encode`], each id with its byte range, up to some tokens after `most`.
    pub(super) fn spans(&self, text: &str, most: usize) -> Result<Spans, DataError> {
        let mut spans = Spans::new();
        windows::encode(
            text,
            |part| self.spans_at_once(part),
            |tokens| {
                spans.extend(tokens);
                spans.len() <= most
            },
        )?;
        Ok(spans)
    }

    fn spans_at_once(&self, text: &str) -> Result<Spans, DataError> {
        let encoding = self.inner.encode(text, false).map_err(|error| failure(&self.name, error))?;
        let offsets = encoding.get_offsets().iter().map(|(begin, end)| *begin..*end);
        Ok(encoding.get_ids().iter().copied().zip(offsets).collect())
    }

    /// Tokens that the post-processor adds before a text.
    pub fn begin(&self) -> &[u32] {
        &self.begin
    }

    /// Tokens that the post-processor adds after a text.
    pub fn end(&self) -> &[u32] {
        &self.end
    }

    /// End-of-text token named by the files next to the tokenizer.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Text of a token; empty if there is no such token.
    pub(super) fn token(&self, id: u32) -> String {
        self.inner.id_to_token(id).unwrap_or_default()
    }

    /// Text of ids; special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        self.inner.decode(ids, true).map_err(|error| failure(&self.name, error))
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        // Ids of added tokens may leave gaps: an embedding needs a row for the highest.
        let highest = self.inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        self.inner.get_vocab_size(true).max(highest)
    }

    /// Id that marks the start of documents; none if neither the tokenizer nor the files next to it name one.
    pub fn separator(&self) -> Option<u32> {
        self.separator
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into a folder, each completely or not at all.
    pub fn save(&self, dir: &Path) -> Result<(), DataError> {
        let token = self.separator.and_then(|separator| self.inner.id_to_token(separator));
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token,
            "eos_token": token,
            "clean_up_tokenization_spaces": false,
        });
        for (name, text) in [("tokenizer.json", self.json()?), (TOKENIZER_CONFIG, format!("{config:#}\n"))] {
            let path = dir.join(name);
            write_whole(&path, text.as_bytes()).map_err(DataError::write(&path))?;
        }
        Ok(())
    }

    /// SHA-256 of the tokenizer in hexadecimal digits.
    pub fn fingerprint(&self) -> Result<String, DataError> {
        // Converted to a value first, so that the order of the keys does not change between processes.
        let value: serde_json::Value =
            serde_json::from_str(&self.json()?).map_err(|error| failure(&self.name, error.into()))?;
        Ok(format!("{:x}", Sha256::digest(value.to_string())))
    }

    fn json(&self) -> Result<String, DataError> {
        self.inner.to_string(false).map_err(|error| failure(&self.name, error))
    }
}

/// Tokens that the post-processor adds before and after a text.
fn affixes(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), tokenizers::Error> {
    let (alone, whole) = (inner.encode_fast("a", false)?, inner.encode_fast("a", true)?);
    let (alone, whole) = (alone.get_ids(), whole.get_ids());
    let at = (0..=whole.len().saturating_sub(alone.len())).find(|at| whole[*at..].starts_with(alone)).unwrap_or(0);
    Ok((whole[..at].to_vec(), whole[(at + alone.len()).min(whole.len())..].to_vec()))
}

fn failure(name: &str, error: tokenizers::Error) -> DataError {
    DataError::Tokenizer { name: name.to_string(), problem: error.to_string() }
}

fn separator_token() -> AddedToken {
    AddedToken::from(SEPARATOR, true)
}

fn byte_pair(model: BPE) -> Result<BytePair, DataError> {
    let byte_level = ByteLevel::new(false, true, true);
    TokenizerBuilder::new()
        .with_model(model)
        .with_normalizer(None)
        .with_pre_tokenizer(Some(PreTokenizerWrapper::from(byte_level)))
        .with_post_processor(Some(PostProcessorWrapper::from(byte_level)))
        .with_decoder(Some(DecoderWrapper::from(byte_level)))
        .build()
        .map_err(|error| failure("byte level", error))
}

/// Printable character that represents a byte in byte-level vocabularies: itself, or one from 256 on for the others in
/// order.
fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let place = (0..byte).filter(|other| !printable(*other)).count() as u32;
            char::from_u32(256 + place).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    }
}

#[cfg(test)]
mod tests;
