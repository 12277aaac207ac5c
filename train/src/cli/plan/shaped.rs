//! The model that a plan is made for.

use std::path::Path;

use lowrank_models::LlamaConfig;

use crate::build::{
    BEYOND_ANY_MACHINE, BuildError, check_length, check_sizes, check_text, is_vision, model_config, model_folder,
    set_usual_layer_rank, usual_length, usual_rank,
};
use crate::config::{Config, Job, count};
use crate::data::Tokenizer;
use crate::plan::Freedom;
use crate::recipe::TrainedModel;

/// A configuration with the shape of its model, and the model that is fine-tuned.
pub struct Shaped {
    pub config: Config,
    pub shape: LlamaConfig,
    pub tuned: Option<TrainedModel>,
    ids: usize,
}

impl Shaped {
    /// Completes a configuration without reading the data. Rejects sizes that no machine has.
    pub fn of(mut config: Config, freedom: Freedom, job: Job) -> Result<Self, BuildError> {
        if is_vision(&config.model)? {
            return Err(BuildError::Settings(format!(
                "model.name = {}: memory and time are forecast of language models alone; a vision transformer is measured by some steps of a run",
                config.model.name
            )));
        }
        check_text(&config)?;
        let (tuned, ids) = match job {
            Job::Finetune => (Some(TrainedModel::of_folder(&config)?), 1),
            Job::Pretrain => (None, vocabulary(&config)?),
        };
        let shape = match &tuned {
            Some(tuned) => tuned.hub.llama.clone(),
            None => model_config(&config.model, ids, None)?.llama,
        };
        if freedom.seq_len {
            usual_length(&mut config, &shape);
        }
        usual_rank(&mut config, shape.hidden_size);
        set_usual_layer_rank(&mut config.model, &shape)?;
        check_sizes(&config, &shape, BEYOND_ANY_MACHINE)?;
        check_length(&config, &shape)?;
        Ok(Self { config, shape, tuned, ids })
    }

    /// The shape of the model of a variant of the configuration.
    pub fn llama(&self) -> impl Fn(&Config) -> Result<LlamaConfig, BuildError> + '_ {
        |config| match &self.tuned {
            Some(tuned) => Ok(tuned.hub.llama.clone()),
            None => model_config(&config.model, self.ids, None).map(|hub| hub.llama),
        }
    }
}

/// One line about a model and its sequences.
pub fn summary(shape: &LlamaConfig, config: &Config) -> String {
    format!(
        "{} hidden, {} layers, vocabulary {}, {} tokens in a sequence; {} values when dense",
        count(shape.hidden_size as u64),
        shape.num_hidden_layers,
        count(shape.vocab_size as u64),
        config.train.seq_len,
        count(dense_values(shape)),
    )
}

fn dense_values(llama: &LlamaConfig) -> u64 {
    let dense = LlamaConfig { parameterization: Default::default(), ..llama.clone() };
    dense.parameters() as u64
}

/// Number of ids of the run's tokenizer.
fn vocabulary(config: &Config) -> Result<usize, BuildError> {
    if model_folder(&config.model).is_some() {
        // The configuration of the folder counts.
        return Ok(1);
    }
    Ok(match config.tokenizer.path.as_str() {
        "" => config.tokenizer.vocab_size,
        "bytes" => Tokenizer::bytes()?.vocab_size(),
        path => Tokenizer::from_file(Path::new(path))?.vocab_size(),
    })
}
