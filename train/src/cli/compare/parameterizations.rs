//! `lowrank compare parameterizations`.

use std::process::ExitCode;

use lowrank_models::ModelError;
use lowrank_models::linear::{PARAMETERIZATIONS, ParameterizationEntry};
use lowrank_optim::registry::optimizer as find;

use super::common::Common;
use super::comparison::{Comparison, chosen};
use super::optimizers::{pretraining, usual};
use super::search::{Contender, Row};
use super::table::{Column, PEAK, STATE, STEP};
use super::trial::Trial;
use crate::build::BuildError;
use crate::config::bytes;

/// Pretrain the same model with several parameterizations of its linear layers, all of the same rank.
///
/// When the best learning rate is the smallest or the largest one, the next one on that side is tried too. Parameterizations with restarts restart
/// after each third of the run.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lowrank compare parameterizations --steps 400
  lowrank compare parameterizations dense low-rank --rank 64 --set model.hidden_size=256
  lowrank compare parameterizations low-rank --set model.parameterization.options.init=gaussian --out runs/gaussian")]
pub struct Args {
    /// Parameterizations to compare; none: all of `lowrank methods`
    names: Vec<String>,
    /// Steps of each run
    #[arg(long, default_value_t = 400)]
    steps: u64,
    /// Rank of all but the dense one
    #[arg(long, default_value_t = 32)]
    rank: u64,
    /// Optimizer of all runs, see `lowrank methods`
    #[arg(long, default_value = "adamw")]
    optimizer: String,
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let optimizer = find(&args.optimizer).map_err(BuildError::from)?;
    let known = |name: &str| -> anyhow::Result<&'static ParameterizationEntry> {
        Ok(ParameterizationEntry::find(name).map_err(|error| BuildError::from(ModelError::from(error)))?)
    };
    let entries = chosen(&args.names, PARAMETERIZATIONS.iter(), known)?;
    let contender = |entry: &'static ParameterizationEntry| {
        let name = entry.spec().name;
        let mut command = pretraining(optimizer.name, args.steps);
        command.extend(["--parameterization".into(), name.into()]);
        for setting in settings(entry, args.rank, args.steps) {
            command.extend(["--set".into(), setting]);
        }
        Contender { name, lrs: usual(optimizer), command }
    };
    let comparison = Comparison {
        what: "parameterization",
        folder: "compare-parameterizations",
        contenders: entries.into_iter().map(contender).collect(),
        most: 6,
        columns: vec![
            Column { title: "against dense", cell: &against_dense },
            Column { title: "weights", cell: &|trial, _| bytes(trial.summary.weight_bytes) },
            STATE,
            PEAK,
            STEP,
        ],
    };
    comparison.run(&args.common)
}

/// Loss as a multiple of the loss of dense layers.
fn against_dense(trial: &Trial, rows: &[Row]) -> String {
    let dense = rows.iter().find(|row| row.name == "dense").and_then(|row| row.best.as_ref().ok());
    dense.map_or_else(String::new, |dense| format!("{:.3} x", trial.loss / dense.loss))
}

fn settings(entry: &ParameterizationEntry, rank: u64, steps: u64) -> Vec<String> {
    let third = (steps / 3).max(1);
    let mut options = Vec::new();
    if entry.spec().options().get("rank").is_some() {
        options.push(format!("rank={rank}"));
    }
    if let Some(period) = entry.spec().period {
        options.push(format!("{period}={third}"));
        options.push(format!("restart_warmup={}", third / 10));
    }
    options.into_iter().map(|option| format!("model.parameterization.options.{option}")).collect()
}
