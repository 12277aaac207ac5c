//! Rows of a plan, as a table and as JSON.

use lowrank_optim::WeightStorage;
use serde_json::{Value, json};

use crate::config::{Config, Job, bytes, count};
use crate::plan::{Candidate, mode};

/// Heads of the columns.
pub fn head(job: Job) -> Vec<String> {
    let layers = if job == Job::Finetune { "ADAPTER" } else { "LAYERS" };
    let names = ["FITS", layers, "RANK", "STORED", "OPTIMIZER", "BACKWARD", "BATCH", "TRAINED", "WEIGHTS"];
    let sizes = ["GRADIENTS", "STATE", "ACTIVATIONS", "PEAK"];
    names.into_iter().chain(sizes).map(String::from).collect()
}

/// Cells of a row; `fits` is none without a limit.
pub fn row(candidate: &Candidate, fits: Option<bool>) -> Vec<String> {
    let forecast = &candidate.forecast;
    let (layers, rank) = layers(&candidate.config);
    vec![
        match fits {
            Some(true) => "yes",
            Some(false) => "no",
            None => "",
        }
        .into(),
        layers,
        rank.unwrap_or_default(),
        stored(&candidate.config),
        candidate.optimizer(),
        mode(candidate.config.train.backward).into(),
        format!("{} x {}", candidate.config.train.batch, candidate.config.train.accumulation),
        count(forecast.trained / 4),
        bytes(forecast.weights),
        bytes(forecast.gradients),
        bytes(forecast.state),
        bytes(forecast.activations),
        bytes(forecast.peak),
    ]
}

/// Describes a row in the words of the settings.
pub fn describe(candidate: &Candidate) -> String {
    match candidate.config.run.job {
        Job::Finetune => format!("{}, {}", candidate.config.adapter.name, candidate.describe()),
        Job::Pretrain => candidate.describe(),
    }
}

/// Settings that a search varies.
const VARIED: [&str; 9] = [
    "model.parameterization.name",
    "weights.storage",
    "weights.base",
    "optimizer.name",
    "optimizer.clip",
    "optimizer.block_clip",
    "train.backward",
    "train.batch",
    "train.accumulation",
];

/// A row for programs. Its settings are those that differ from the defaults of the job, and all that a search varies: a run with them is
/// that of the row.
pub fn json_row(candidate: &Candidate, fits: Option<bool>) -> Value {
    let Candidate { config, forecast, .. } = candidate;
    let usual = Config::of(config.run.job).entries();
    let mut settings = config.entries();
    settings.retain(|key, value| {
        key != "train.memory" && (VARIED.contains(&key.as_str()) || usual.get(key) != Some(value))
    });
    json!({
        "fits": fits,
        "describe": describe(candidate),
        "settings": settings.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>(),
        "adapter": (config.run.job == Job::Finetune).then_some(&config.adapter.name),
        "parameterization": config.model.parameterization.name,
        "optimizer": config.optimizer.name,
        "storage": stored(config),
        "backward": mode(config.train.backward),
        "batch": [config.train.batch, config.train.accumulation],
        "trained_parameters": forecast.trained / 4,
        "weight_bytes": forecast.weights,
        "gradient_bytes": forecast.gradients,
        "state_bytes": forecast.state,
        "activation_bytes": forecast.activations,
        "peak_bytes": forecast.peak,
    })
}

/// What is trained in the place of dense layers, and its rank.
fn layers(config: &Config) -> (String, Option<String>) {
    if config.run.job == Job::Finetune {
        let rank = config.adapter.rank.map(|rank| rank.to_string());
        return (config.adapter.name.clone(), rank);
    }
    let section = &config.model.parameterization;
    (section.name.clone(), section.options.get("rank").map(|rank| rank.to_string()))
}

fn stored(config: &Config) -> String {
    match config.weights.storage {
        WeightStorage::F32 if config.run.job == Job::Finetune && config.adapter.name != "none" => {
            config.weights.base.to_string()
        }
        storage => storage.to_string(),
    }
}
