//! Pretraining: a model, new or from a folder, learns from text.

use std::path::Path;

use lowrank_models::adapter::Rule;

use super::{HeldOut, RunData, SampleStart, TrainedModel};
use crate::build::{BuildError, model_config, model_folder};
use crate::config::{Config, bytes, count};
use crate::data::{Batches, Prepared, Tokenizer};
use crate::objective::TokenStream;

impl RunData {
    /// Text as one stream of tokens.
    pub fn text(config: &Config, prepared: Prepared) -> Result<Self, BuildError> {
        let (batch, seq_len, mask) = (config.train.batch, config.train.seq_len, config.data.document_mask);
        let (train, validation, tokenizer) = (&prepared.train, &prepared.validation, prepared.tokenizer);
        let ids = |ids: Vec<u32>| ids.into_iter().map(|id| id as i32).collect();
        Ok(Self {
            told: format!(
                "{} tokens to learn from ({} of text), {} held out",
                count(train.len()),
                bytes(train.text_bytes()),
                count(validation.len())
            ),
            // Names every token file with its hash, and the tokenizer.
            fingerprint: train.manifest().sha256.clone(),
            held_out: Some(HeldOut {
                bytes: validation.text_bytes(),
                gzip_bits_per_byte: prepared.facts.gzip_bits_per_byte,
            }),
            sample: SampleStart {
                prompt: ids(tokenizer.encode_whole(&config.log.sample_prompt)?),
                ends: ids(tokenizer.separator().into_iter().collect()),
            },
            ask: "--prompt \"fn main() {\"".into(),
            train: TokenStream::new(Batches::train(train.clone(), batch, seq_len, config.train.seed)?, mask),
            validation: TokenStream::new(Batches::validation(validation.clone(), batch, seq_len)?, mask),
            tokenizer,
        })
    }
}

impl TrainedModel {
    /// A model that learns from text, new or from a folder.
    pub fn of_text(config: &Config, tokenizer: &Tokenizer) -> Result<Self, BuildError> {
        Ok(Self {
            hub: model_config(&config.model, tokenizer.vocab_size(), tokenizer.separator())?,
            folder: model_folder(&config.model).map(Path::to_path_buf),
            adapter: None,
            begun: None,
            rule: Rule::Plain,
        })
    }
}
