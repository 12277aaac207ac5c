//! Fine-tuning: a model of a folder is trained on examples, whole or with an adapter.

use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use lowrank_models::Llama;
use lowrank_models::hub::{HubConfig, ModelFolder};

use super::memory::{complete, fitting};
use super::stage::searched;
use super::{ModelText, Recipe, RunData, SampleStart, Stage, TrainedModel, check_vocabulary};
use crate::build::{Architecture, BuildError, Listener, check_length, held_out, source};
use crate::config::{Config, count};
use crate::data::{Example, ExampleList, ExampleOptions, Examples, Held, Order, Rows, Samples};
use crate::objective::{SEARCH, Stream, TokenStream};
use crate::plan::{Forecaster, Freedom};

impl Recipe {
    /// Fine-tuning: one stage on examples, or as many as the allocation has.
    pub(super) fn finetune(
        mut config: Config,
        freedom: Freedom,
        listener: &mut dyn Listener,
    ) -> Result<Self, BuildError> {
        let mut model = TrainedModel::of_folder(&config)?;
        complete(&mut config, freedom, &model.hub.llama, listener)?;
        check_length(&config, &model.hub.llama)?;
        let examples = ReadExamples::read(&config, &model.hub, listener)?;
        let llama = |_: &Config| Ok(model.hub.llama.clone());
        let forecaster = Forecaster::new(&llama, model.adapter(), &*model.rule, model.allocation.as_deref());
        let (config, forecast) = fitting(config, freedom, forecaster, 0, listener)?;
        // The storage may depend on the memory that there is.
        model.storage = <Llama as Architecture>::storage(&config, &model.hub, model.adapter.is_some())?;
        let fraction = model.allocation.as_ref().and_then(|allocation| allocation.search_fraction());
        let parts = fraction.map(|fraction| examples.parts(&config, fraction)).transpose()?;
        let data = examples.into_rows(&config)?;
        let steps = config.total_steps(data.train.rows());
        let mut stages: Vec<Stage> = Stage::of_allocation("finetune", data, model.allocation.as_deref(), steps)?;
        if let (Some([learned, searched]), Some(stage)) = (parts, stages.first_mut()) {
            stage.data.train = learned;
            stage.streams.push((SEARCH.into(), Box::new(searched)));
        }
        Ok(Self { config, model, stages, forecast })
    }
}

/// Examples and related data, not yet in rows: the batch size may depend on the memory that is left.
pub struct ReadExamples {
    examples: Examples,
    text: ModelText,
    end: u32,
    ask: String,
}

impl ReadExamples {
    /// Reads the data with the tokenizer and the chat template of the model's folder.
    pub fn read(config: &Config, hub: &HubConfig, listener: &mut dyn Listener) -> Result<Self, BuildError> {
        let folder = Path::new(&config.model.name);
        let text = ModelText::read(folder, hub)?;
        let (rows, end) = (hub.llama.vocab_size, text.end()?);
        if let Some(warning) = check_vocabulary(text.tokenizer.vocab_size(), rows, folder)? {
            listener.warn(&warning);
        }
        let section = &config.data;
        listener.begin("reading the examples", 0);
        let source = source(config);
        let examples = Examples::read(&ExampleOptions {
            source: &source,
            held_out: &held_out(config),
            tokenizer: &text.tokenizer,
            template: text.template.as_ref(),
            end,
            vocab_size: rows,
            learn_prompt: section.learn_prompt,
            seq_len: config.train.seq_len,
            length_key: "train.seq_len",
            too_long: section.too_long,
            seed: config.train.seed,
            cache: &section.cache,
            fields: &[],
        })?;
        listener.end();
        let ask = match source.holds()? {
            Held::Conversations => "generate MODEL --chat \"MESSAGE\"",
            Held::Pairs => "generate MODEL --prompt \"PROMPT\"",
            Held::Texts => "generate MODEL --prompt \"TEXT\"",
        };
        Ok(Self { examples, text, end, ask: ask.into() })
    }

    /// Training examples in two parts, each in rows: those of the steps of a search, and the fraction that it searches with.
    pub fn parts(&self, config: &Config, fraction: f64) -> Result<[TokenStream; 2], BuildError> {
        let examples = &self.examples.train;
        let count = examples.len();
        let searched = searched(fraction, count)?;
        let order = NonZeroU64::new(count as u64).map(|count| Order::new(count, config.train.seed));
        let drawn: BTreeSet<usize> =
            order.iter().flat_map(|order| (0..searched as u64).map(|place| order.window(place).1 as usize)).collect();
        let part = |of_search: bool| {
            let chosen = examples.select(|place| drawn.contains(&place) == of_search);
            self.rows(config, chosen).shuffled(config.train.seed)
        };
        let mask = config.data.document_mask;
        Ok([TokenStream::new(part(false), mask), TokenStream::new(part(true), mask)])
    }

    fn rows(&self, config: &Config, examples: ExampleList) -> Rows {
        let rows = Rows::new(examples, config.train.batch, self.end);
        if config.data.packing { rows.packed(config.train.seq_len, config.train.seed) } else { rows }
    }

    /// Arranges the examples in rows.
    pub fn into_rows(mut self, config: &Config) -> Result<RunData, BuildError> {
        let (section, seq_len, seed) = (&config.data, config.train.seq_len, config.train.seed);
        let (examples, text) = (&self.examples, &self.text);
        let (fingerprint, held_out_fingerprint) = (examples.fingerprint(), examples.held_out_fingerprint());
        let sums =
            |of: fn(&Example) -> usize| count(examples.train.iter().map(|example| of(&example)).sum::<usize>() as u64);
        let mut description = format!(
            "{} examples to learn from with {} tokens, of which {} count; {} held out",
            count(examples.train.len() as u64),
            sums(|example| example.inputs.len()),
            sums(Example::learned),
            count(examples.validation.len() as u64)
        );
        if examples.truncated > 0 {
            description.push_str(&format!("; {} were cut to {seq_len} tokens", count(examples.truncated as u64)));
        }
        if examples.dropped > 0 {
            description
                .push_str(&format!("; {} with more than {seq_len} were left out", count(examples.dropped as u64)));
        }
        let ids = |ids: Vec<u32>| ids.into_iter().map(|id| id as i32).collect();
        let sample = SampleStart {
            prompt: match (
                config.log.sample_prompt.as_str(),
                (!examples.validation.is_empty()).then(|| examples.validation.get(0)),
            ) {
                ("", Some(example)) => example.prompt().to_vec(),
                (prompt, _) => ids(text.prompt(prompt, true)?),
            },
            ends: ids(text.all_ends()?),
        };
        let [train, validation] = [&mut self.examples.train, &mut self.examples.validation].map(std::mem::take);
        let (train, validation) = (self.rows(config, train).shuffled(seed), self.rows(config, validation));
        if section.packing {
            description.push_str(&format!("; {} rows an epoch", count(train.rows())));
        }
        Ok(RunData {
            train: TokenStream::new(train, section.document_mask),
            validation: TokenStream::new(validation, section.document_mask),
            tokenizer: self.text.tokenizer,
            fingerprint,
            held_out_fingerprint,
            held_out: None,
            sample,
            description,
            ask: self.ask,
        })
    }
}

impl TrainedModel {
    /// Model of a folder that is trained on examples.
    pub fn of_folder(config: &Config) -> Result<Self, BuildError> {
        if config.model.name.is_empty() {
            return Err(BuildError::Settings("name the folder of the model to fine-tune with --model DIR".into()));
        }
        let folder = PathBuf::from(&config.model.name);
        let hub = ModelFolder::open(&folder)?.config;
        Self::fine_tuned(config, hub, folder)
    }
}
