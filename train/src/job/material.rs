//! What a run learns from and is measured on.

use std::path::Path;

use super::JobError;
use super::subject::Subject;
use crate::config::Config;
use crate::data::{
    Batches, ChatTemplate, Example, ExampleOptions, Examples, Marks, Prepared, Rows, Samples, Source, Tokenizer,
};
use crate::run::{Screen, bytes, count};

/// Rows to learn from, rows that are held out, and what belongs to them.
pub(super) struct Material {
    pub train: Box<dyn Samples>,
    pub validation: Box<dyn Samples>,
    pub tokenizer: Tokenizer,
    /// Hash of all that is learned from.
    pub fingerprint: String,
    /// The held-out text itself, where it is plain text.
    pub held_out: Option<HeldOut>,
    pub sample: SampleStart,
    /// One line on how much there is.
    pub told: String,
}

/// The held-out text.
pub(super) struct HeldOut {
    pub bytes: u64,
    /// Bits that `gzip -9` needs for each byte.
    pub gzip_bits_per_byte: f64,
}

/// How a sample of the model's writing begins and ends.
pub(super) struct SampleStart {
    /// Tokens before the first that the model writes.
    pub prompt: Vec<i32>,
    /// Tokens that end it.
    pub ends: Vec<i32>,
}

impl Material {
    /// Text as one stream of tokens.
    pub fn text(config: &Config, prepared: Prepared) -> Result<Self, JobError> {
        let (batch, seq_len) = (config.train.batch, config.train.seq_len);
        let (train, validation, tokenizer) = (&prepared.train, &prepared.validation, prepared.tokenizer);
        let marks = Marks { begin: Some(tokenizer.separator()), end: tokenizer.separator() };
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
                prompt: prompt(&tokenizer, marks, &config.log.sample_prompt)?,
                ends: vec![marks.end as i32],
            },
            train: Box::new(Batches::train(train.clone(), batch, seq_len, config.train.seed)?),
            validation: Box::new(Batches::validation(validation.clone(), batch, seq_len)?),
            tokenizer,
        })
    }

    /// Examples, with the tokenizer and the chat template of the model's folder.
    pub fn examples(config: &Config, subject: &Subject, screen: &mut Screen) -> Result<Self, JobError> {
        let (hub, folder) = (&subject.hub, Path::new(&config.model.name));
        let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
        if tokenizer.vocab_size() > hub.llama.vocab_size {
            return Err(JobError::Settings(format!(
                "the tokenizer in {} has {} ids, the model an embedding for {}; they do not belong together",
                folder.display(),
                tokenizer.vocab_size(),
                hub.llama.vocab_size
            )));
        }
        let template = ChatTemplate::read(folder)?;
        let ends = hub.tokens("eos_token_id");
        let marks =
            Marks { begin: tokenizer.begins(hub), end: ends.first().copied().unwrap_or_else(|| tokenizer.separator()) };
        let (section, seq_len, seed) = (&config.data, config.train.seq_len, config.train.seed);
        screen.begin("reading the examples", 0);
        let examples = Examples::read(&ExampleOptions {
            source: &Source { paths: section.path.clone(), format: section.format, field: section.field.clone() },
            tokenizer: &tokenizer,
            template: template.as_ref(),
            marks,
            learn_prompt: section.learn_prompt,
            seq_len,
            validation_fraction: section.validation_fraction,
            seed,
        })?;
        screen.end();
        let fingerprint = examples.fingerprint();
        let sums = |of: fn(&Example) -> usize| count(examples.train.iter().map(of).sum::<usize>() as u64);
        let mut told = format!(
            "{} examples to learn from with {} tokens, of which {} count; {} held out",
            count(examples.train.len() as u64),
            sums(|example| example.inputs.len()),
            sums(Example::learned),
            count(examples.validation.len() as u64)
        );
        if examples.truncated > 0 {
            told.push_str(&format!("; {} were cut to {seq_len} tokens", count(examples.truncated as u64)));
        }
        let sample = SampleStart {
            prompt: match (config.log.sample_prompt.as_str(), examples.validation.first()) {
                ("", Some(example)) => example.prompt().to_vec(),
                (text, _) => prompt(&tokenizer, marks, text)?,
            },
            ends: if ends.is_empty() { vec![marks.end as i32] } else { ends.iter().map(|id| *id as i32).collect() },
        };
        let rows = |examples: Vec<Example>| {
            let rows = Rows::new(examples, config.train.batch, marks.end);
            if section.packing { rows.packed(seq_len, seed) } else { rows }
        };
        let (train, validation) = (rows(examples.train).shuffled(seed), rows(examples.validation));
        if section.packing {
            told.push_str(&format!("; {} rows an epoch", count(train.rows())));
        }
        Ok(Self {
            train: Box::new(train),
            validation: Box::new(validation),
            tokenizer,
            fingerprint,
            held_out: None,
            sample,
            told,
        })
    }
}

/// A text as the beginning of a sample.
fn prompt(tokenizer: &Tokenizer, marks: Marks, text: &str) -> Result<Vec<i32>, JobError> {
    let ids = marks.begin.into_iter().chain(tokenizer.encode(text)?);
    Ok(ids.map(|id| id as i32).collect())
}
