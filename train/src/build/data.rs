//! Text and tokenizer of a run.

use std::path::PathBuf;

use super::{BuildError, Listener, model_folder};
use crate::config::Config;
use crate::data::{
    Format, HeldOut, PrepareOptions, Prepared, Progress, Source, Stage, TokenizerChoice, default_corpus, prepare,
};
use crate::process::BlockAllocator;

/// Name of a model's tokenizer.
const TOKENIZER: &str = "tokenizer.json";

/// Returns the data that the configuration names.
pub fn source(config: &Config) -> Source {
    let section = &config.data;
    Source { paths: section.path.clone(), format: section.format, field: section.field.clone() }
}

/// Returns the part of the data used for validation.
pub fn held_out(config: &Config) -> HeldOut {
    let section = &config.data;
    match section.validation.is_empty() {
        true => HeldOut::Fraction(section.validation_fraction),
        false => HeldOut::Source(Source { paths: section.validation.clone(), ..source(config) }),
    }
}

/// Text and tokenizer settings of the configuration.
pub fn prepare_options(config: &Config) -> Result<PrepareOptions, BuildError> {
    let folder = model_folder(&config.model);
    let tokenizer = match config.tokenizer.path.as_str() {
        "bytes" => TokenizerChoice::Bytes,
        // An existing model has its own tokenizer.
        "" => match folder
            .filter(|folder| folder.is_file() || folder.join(TOKENIZER).exists())
            .map(|folder| folder.join(TOKENIZER))
        {
            Some(path) => TokenizerChoice::File(path),
            None => TokenizerChoice::Train(config.tokenizer.vocab_size),
        },
        path => TokenizerChoice::File(PathBuf::from(path)),
    };
    let source = match config.data.path.is_empty() {
        true => Source { paths: default_corpus()?, format: Format::Text, ..source(config) },
        false => source(config),
    };
    Ok(PrepareOptions { source, tokenizer, held_out: held_out(config), seed: config.train.seed })
}

/// Prepares the data and reports progress.
pub fn prepare_data(config: &Config, listener: &mut dyn Listener) -> Result<Prepared, BuildError> {
    let options = prepare_options(config)?;
    let mut shown = None;
    let mut show = |Progress { stage, done, total }: Progress| {
        if shown != Some(stage) {
            shown = Some(stage);
            let what = match stage {
                Stage::Scan => "reading the text",
                Stage::TrainTokenizer => "training the tokenizer",
                Stage::Encode => "turning text into tokens",
                Stage::Verify => "checking the tokens",
            };
            listener.begin(what, total);
        }
        listener.advance(done);
    };
    let prepared = prepare(&options, &config.data.cache, &mut show)?;
    if config.data.verify {
        prepared.train.verify(&mut show)?;
        prepared.validation.verify(&mut show)?;
    }
    let fresh = shown.is_some_and(|stage| stage != Stage::Verify);
    listener.end();
    // Training a tokenizer needs more memory than it keeps.
    BlockAllocator::begin_anew();
    let skipped = prepared.facts.skipped;
    if fresh && !skipped.is_nothing() {
        listener.line(&skipped.to_string());
    }
    Ok(prepared)
}
