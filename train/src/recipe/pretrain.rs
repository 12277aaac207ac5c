//! Pretraining: a model, new or from a folder, is trained on text.

use std::path::Path;

use lowrank_models::adapter::PlainRule;

use super::memory::{complete, fitting};
use super::{Recipe, RunData, SampleStart, Stage, TrainedModel, check_vocabulary};
use crate::build::{
    BuildError, HeldOut, Listener, check_length, matrix_storage, model_config, model_folder, prepare_data,
};
use crate::config::{Config, bytes, count};
use crate::data::{Batches, Prepared, Tokenizer};
use crate::objective::{Stream, TokenStream};
use crate::plan::{Forecaster, Freedom};

impl Recipe {
    /// Pretraining: one stage on text.
    pub(super) fn pretrain(
        mut config: Config,
        freedom: Freedom,
        listener: &mut dyn Listener,
    ) -> Result<Self, BuildError> {
        let prepared = prepare_data(&config, listener)?;
        let (ids, separator) = (prepared.tokenizer.vocab_size(), prepared.tokenizer.separator());
        let llama = |config: &Config| Ok(model_config(&config.model, ids, separator)?.llama);
        let shape = llama(&config)?;
        complete(&mut config, freedom, &shape, listener)?;
        // Verified token files are already in memory.
        let mapped = if config.data.verify { 0 } else { prepared.mapped_bytes() };
        let forecaster = Forecaster::new(&llama, None, &PlainRule {}, None);
        let (config, forecast) = fitting(config, freedom, forecaster, mapped, listener)?;
        let model = TrainedModel::of_text(&config, &prepared.tokenizer)?;
        check_length(&config, &model.hub.llama)?;
        let rows = model.hub.llama.vocab_size;
        if let Some(warning) = check_vocabulary(ids, rows, Path::new(&config.model.name))? {
            listener.warn(&warning);
            prepared.check_ids(rows)?;
        }
        let data = RunData::text(&config, prepared)?;
        let steps = config.total_steps(data.train.rows());
        Ok(Self { config, model, stages: vec![Stage::new("pretrain", data, steps)], forecast })
    }
}

impl RunData {
    /// Text as one stream of tokens.
    pub fn text(config: &Config, prepared: Prepared) -> Result<Self, BuildError> {
        let (batch, seq_len, mask) = (config.train.batch, config.train.seq_len, config.data.document_mask);
        let (train, validation, tokenizer) = (&prepared.train, &prepared.validation, prepared.tokenizer);
        let ids = |ids: Vec<u32>| ids.into_iter().map(|id| id as i32).collect();
        Ok(Self {
            description: format!(
                "{} tokens to learn from ({} of text), {} held out",
                count(train.len()),
                bytes(train.text_bytes()),
                count(validation.len())
            ),
            // Names every token file with its hash, and the tokenizer.
            fingerprint: train.manifest().sha256.clone(),
            held_out_fingerprint: validation.manifest().sha256.clone(),
            held_out: Some(HeldOut {
                bytes: validation.text_bytes(),
                gzip_bits_per_byte: prepared.facts.gzip_bits_per_byte,
            }),
            sample: SampleStart {
                prompt: ids(tokenizer.encode_whole(&config.log.sample_prompt)?),
                ends: ids(tokenizer.separator().into_iter().collect()),
            },
            ask: "generate MODEL --prompt \"fn main() {\"".into(),
            train: TokenStream::new(Batches::train(train.clone(), batch, seq_len, config.train.seed)?, mask),
            validation: TokenStream::new(Batches::validation(validation.clone(), batch, seq_len)?, mask),
            tokenizer,
        })
    }
}

impl TrainedModel {
    /// Model that is trained on text, new or from a folder.
    pub fn of_text(config: &Config, tokenizer: &Tokenizer) -> Result<Self, BuildError> {
        let hub = model_config(&config.model, tokenizer.vocab_size(), tokenizer.separator())?;
        Ok(Self {
            storage: matrix_storage(config, &hub.llama, false)?,
            hub,
            folder: model_folder(&config.model).map(Path::to_path_buf),
            adapter: None,
            begun: None,
            allocation: None,
            rule: Box::default(),
        })
    }
}
