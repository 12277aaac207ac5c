//! Fine-tuning: a model of a folder, whole or by an adapter, learns from examples.

use std::path::{Path, PathBuf};

use lowrank_models::adapter::Rule;
use lowrank_models::hub::{HubConfig, ModelFolder};
use lowrank_optim::rules::LoraProMode;

use super::{RunData, SampleStart, TrainedModel};
use crate::build::{self, BuildError, Listener, adapter_folder};
use crate::config::{Config, count};
use crate::data::{ChatTemplate, Example, ExampleOptions, Examples, Marks, Rows, Samples, Source, Tokenizer};
use crate::objective::TokenStream;

impl RunData {
    /// Examples, with the tokenizer and the chat template of the model's folder.
    pub fn examples(config: &Config, hub: &HubConfig, listener: &mut dyn Listener) -> Result<Self, BuildError> {
        let folder = Path::new(&config.model.name);
        let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
        if tokenizer.vocab_size() > hub.llama.vocab_size {
            return Err(BuildError::Settings(format!(
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
        listener.begin("reading the examples", 0);
        let examples = Examples::read(&ExampleOptions {
            source: &Source { paths: section.path.clone(), format: section.format, field: section.field.clone() },
            tokenizer: &tokenizer,
            template: template.as_ref(),
            marks,
            learn_prompt: section.learn_prompt,
            seq_len,
            validation_fraction: section.validation_fraction,
            seed,
            fields: &[],
        })?;
        listener.end();
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
                (text, _) => SampleStart::prompt(&tokenizer, marks, text)?,
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
            train: TokenStream::new(train, section.document_mask),
            validation: TokenStream::new(validation, section.document_mask),
            tokenizer,
            fingerprint,
            held_out: None,
            sample,
            told,
        })
    }
}

impl TrainedModel {
    /// A model of a folder that learns from examples.
    pub fn of_folder(config: &Config) -> Result<Self, BuildError> {
        if config.model.name.is_empty() {
            return Err(BuildError::Settings("name the folder of the model to fine-tune with --model DIR".into()));
        }
        let folder = PathBuf::from(&config.model.name);
        let hub = ModelFolder::open(&folder)?.config;
        let rule = build::rule(&config.rule)?;
        let begun = adapter_folder(&config.adapter)?;
        let given = match &begun {
            Some(begun) => Some(begun.config.clone()),
            None => build::adapter(config)?,
        };
        let adapter = match given {
            Some(given) => {
                let adapter = rule.prepare(given.clone())?;
                if begun.is_some() && adapter != given {
                    return Err(BuildError::Settings(format!(
                        "rule.name = {}: it would make {} of the {} in {}; set it to plain, or begin with a new adapter",
                        rule.name(),
                        adapter.structure,
                        given.structure,
                        config.adapter.name
                    )));
                }
                Some(adapter)
            }
            None if rule == Rule::Plain => None,
            None => {
                return Err(BuildError::Settings(format!(
                    "rule.name = {}: there is no adapter to train by it; set it to plain, or adapter.name to lora",
                    rule.name()
                )));
            }
        };
        let decay = config.optimizer.weight_decay;
        if decay > 0.0 && matches!(rule, Rule::LoraPro { mode: LoraProMode::Full, .. }) {
            return Err(BuildError::Settings(format!(
                "optimizer.weight_decay = {decay} with rule lora-pro in mode full: it would shrink the weights below the adapter, and a checkpoint holds the adapter alone; set it to 0, or rule.options.mode to efficient"
            )));
        }
        let begun = begun.is_some().then(|| PathBuf::from(&config.adapter.name));
        Ok(Self { hub, folder: Some(folder), adapter, begun, rule })
    }
}
