//! `lowrank plan`.

use std::path::Path;
use std::process::ExitCode;

use lowrank_models::LlamaConfig;
use lowrank_models::adapter::{PlainRule, Rule};
use lowrank_optim::WeightStorage;

use super::output::{print, table};
use super::training::SettingArgs;
use crate::build::{
    BEYOND_ANY_MACHINE, BuildError, check_sizes, is_vision, model_config, model_folder, set_usual_layer_rank,
    usual_rank,
};
use crate::config::{Config, Job, bytes, count, parse_bytes};
use crate::data::Tokenizer;
use crate::plan::{Candidate, Forecaster, Freedom, candidates, limit, mode};
use crate::process::sum_bytes;
use crate::recipe::TrainedModel;

/// Estimate the memory of a pretraining run and list cheaper variants.
///
/// The table has one line for each combination of settings left unset: dense or smaller layers, weights in f32 or fewer bytes, AdamW with f32 or 8-bit moments, the three
/// backward modes, the batch at once or accumulated. Lines that fit --memory come first, and among them those that change least; the first one is
/// what `lowrank pretrain --memory` uses. Nothing is trained and nothing of that size is allocated.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank plan --model llama-60m --memory 600MiB
  lowrank plan --model llama-1b --memory 8GiB --set tokenizer.vocab_size=32000
  lowrank plan --finetune --model SmolLM2-135M --memory 400MiB
  lowrank plan --model llama-350m --ranks 8 --bandwidth 10Gbit/s
  lowrank plan --model llama-130m --optimizer galore --set optimizer.options.rank=256 --batch 8

The process is counted as a whole, at its peak; token files that are read are mapped and not counted. On a GPU more is needed.")]
pub struct Args {
    /// Named shape such as llama-9m, or a Hugging Face model folder to go on from
    #[arg(long)]
    model: Option<String>,
    /// Plan a fine-tuning of --model, which is a folder, by an adapter
    #[arg(long)]
    finetune: bool,
    /// Parameterization of the linear layers, see `lowrank methods`
    #[arg(long, value_name = "NAME")]
    parameterization: Option<String>,
    /// tokenizer.json, or `bytes`; without it the vocabulary has tokenizer.vocab_size ids
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<String>,
    /// Processes under mpirun, up to which the traffic of a step is listed
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1024))]
    ranks: Option<u32>,
    /// Speed of the network between them, such as 10Gbit/s or 1.2GB/s
    #[arg(long, value_name = "SPEED", requires = "ranks")]
    bandwidth: Option<String>,
    #[command(flatten)]
    settings: SettingArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut layers = args.settings.layers().map_err(BuildError::from)?;
    layers.optional("--model", "model.name", args.model.as_deref());
    layers.optional("--parameterization", "model.parameterization.name", args.parameterization.as_deref());
    layers.optional("--tokenizer", "tokenizer.path", args.tokenizer.as_deref());
    let job = if args.finetune { Job::Finetune } else { Job::Pretrain };
    let shaped = Shaped::of(layers.resolve(&Config::of(job)).map_err(BuildError::from)?, job)?;
    let (llama, Shaped { config, shape, tuned, .. }) = (shaped.llama(), &shaped);
    let limit = limit(config)?;
    let plain = PlainRule {};
    let rule = tuned.as_ref().map_or(&plain as &dyn Rule, |tuned| &*tuned.rule);
    let adapter = tuned.as_ref().and_then(TrainedModel::adapter);
    let allocation = tuned.as_ref().and_then(|tuned| tuned.allocation.as_deref());
    let forecaster = Forecaster::new(&llama, adapter, rule, allocation);
    let freedom = Freedom::of(&layers, job);
    let mut found = candidates(config, freedom, shape.hidden_size, &|config| forecaster.forecast(config))?;
    let fits = |candidate: &Candidate| limit.is_none_or(|limit| candidate.forecast.peak <= limit);
    // If none fits, the nearest one is the most interesting.
    found.sort_by_key(|candidate| if fits(candidate) { (false, 0) } else { (true, candidate.forecast.peak) });
    let mut rows = vec![HEAD.map(String::from).to_vec()];
    rows.extend(found.iter().map(|candidate| row(candidate, limit.map(|_| fits(candidate)))));
    let mut text = format!("{}\n\n{}", summary(shape, config), table(&rows));
    match (limit, found.first()) {
        (Some(limit), Some(first)) if fits(first) => {
            text.push_str(&format!("\nwithin {} `lowrank {}` uses: {}\n", bytes(limit), job.name(), first.describe()));
        }
        (Some(limit), Some(first)) => {
            text.push_str(&format!("\nnothing fits {}; the least is {}\n", bytes(limit), bytes(first.forecast.peak)));
        }
        _ => {}
    }
    if let (Some(ranks), Some(first)) = (args.ranks, found.first()) {
        let speed = args.bandwidth.as_deref().map(bandwidth).transpose()?;
        text.push_str(&format!("\n{}", table(&traffic(first, ranks, speed))));
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Bytes a second of a text such as `10Gbit/s` or `1.2GB/s`.
fn bandwidth(text: &str) -> Result<f64, BuildError> {
    let units = [("bit/s", 8.0), ("b/s", 1.0)];
    let lower = text.trim().to_ascii_lowercase();
    let parsed = units.into_iter().find_map(|(unit, divisor)| {
        let amount = parse_bytes(&format!("{}b", lower.strip_suffix(unit)?))?;
        Some(amount as f64 / divisor)
    });
    let problem = format!("--bandwidth {text}: write it as a number with a unit, such as 10Gbit/s or 1.2GB/s");
    parsed.ok_or(BuildError::Settings(problem))
}

/// Table of the traffic of a step of a variant, with a row for 1, 2, 4 and so on processes up to a number.
fn traffic(candidate: &Candidate, ranks: u32, speed: Option<f64>) -> Vec<Vec<String>> {
    let Candidate { config, forecast, .. } = candidate;
    let mut head = ["PROCESSES", "ROWS IN A STEP", "MEMORY OF EACH", "EACH SENDS IN A STEP"].map(String::from).to_vec();
    head.extend(speed.map(|_| "AT THIS SPEED".to_string()));
    let mut rows = vec![head];
    let mut numbers: Vec<u64> = (0..).map(|power| 1 << power).take_while(|number| *number < u64::from(ranks)).collect();
    numbers.push(u64::from(ranks));
    // Values are f32 in sums, whatever their storage.
    let values = forecast.trained / 4;
    for number in numbers {
        let sent = sum_bytes(values, number);
        let mut row = vec![
            count(number),
            count(number * (config.train.batch * config.train.accumulation) as u64),
            bytes(forecast.peak),
            bytes(sent),
        ];
        row.extend(speed.map(|speed| format!("{:.3} s", sent as f64 / speed)));
        rows.push(row);
    }
    rows
}

/// A configuration with the shape of its model, and the model that is fine-tuned.
pub struct Shaped {
    pub config: Config,
    pub shape: LlamaConfig,
    tuned: Option<TrainedModel>,
    ids: usize,
}

impl Shaped {
    /// Completes a configuration without reading the data. Rejects sizes that no machine has.
    pub fn of(mut config: Config, job: Job) -> Result<Self, BuildError> {
        if is_vision(&config.model)? {
            return Err(BuildError::Settings(format!(
                "model.name = {}: memory and time are forecast of language models alone; a vision transformer is measured by some steps of a run",
                config.model.name
            )));
        }
        let (tuned, ids) = match job {
            Job::Finetune => (Some(TrainedModel::of_folder(&config)?), 1),
            Job::Pretrain => (None, vocabulary(&config)?),
        };
        let shape = match &tuned {
            Some(tuned) => tuned.hub.llama.clone(),
            None => model_config(&config.model, ids, None)?.llama,
        };
        usual_rank(&mut config, shape.hidden_size);
        set_usual_layer_rank(&mut config.model, &shape)?;
        check_sizes(&config, &shape, BEYOND_ANY_MACHINE)?;
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

const HEAD: [&str; 12] = [
    "FITS",
    "LAYERS",
    "RANK",
    "STORED",
    "OPTIMIZER",
    "BACKWARD",
    "BATCH",
    "WEIGHTS",
    "GRADIENTS",
    "STATE",
    "ACTIVATIONS",
    "PEAK",
];

fn row(candidate: &Candidate, fits: Option<bool>) -> Vec<String> {
    let Candidate { config, forecast, .. } = candidate;
    let rank = config.model.parameterization.options.get("rank");
    vec![
        match fits {
            Some(true) => "yes",
            Some(false) => "no",
            None => "",
        }
        .into(),
        config.model.parameterization.name.clone(),
        rank.map(|rank| rank.to_string()).unwrap_or_default(),
        match config.weights.storage {
            WeightStorage::F32 if config.run.job == Job::Finetune => config.weights.base.to_string(),
            storage => storage.to_string(),
        },
        config.optimizer.name.clone(),
        mode(config.train.backward).into(),
        format!("{} x {}", config.train.batch, config.train.accumulation),
        bytes(forecast.weights),
        bytes(forecast.gradients),
        bytes(forecast.state),
        bytes(forecast.activations),
        bytes(forecast.peak),
    ]
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
