//! `lowrank compare parameterizations`.

use std::process::ExitCode;

use lowrank_models::linear::{PARAMETERIZATIONS, ParameterizationMethod};
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
/// When the best learning rate is the smallest or the largest one, the next one on that side is tried too. ReLoRA restarts, and LORO takes its exact
/// step, after each third of the run.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lowrank compare parameterizations --steps 400
  lowrank compare parameterizations dense low_rank sltrain --rank 64 --set model.hidden_size=256
  lowrank compare parameterizations sltrain --set model.parameterization.options.density=0.1 --out runs/denser")]
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
    let known = |name: &str| {
        let all: Vec<&str> = PARAMETERIZATIONS.iter().map(|method| method.name).collect();
        PARAMETERIZATIONS.iter().find(|method| method.name == name).ok_or_else(|| {
            BuildError::Settings(format!("there is no parameterization {name}; it is one of {}", all.join(", "))).into()
        })
    };
    let methods = chosen(&args.names, PARAMETERIZATIONS.iter(), known)?;
    let contender = |method: &'static ParameterizationMethod| {
        let mut command = pretraining(optimizer.name, args.steps);
        command.extend(["--parameterization".into(), method.name.into()]);
        for setting in settings(method, args.rank, args.steps) {
            command.extend(["--set".into(), setting]);
        }
        Contender { name: method.name, lrs: usual(optimizer), command }
    };
    let comparison = Comparison {
        what: "parameterization",
        folder: "compare-parameterizations",
        contenders: methods.into_iter().map(contender).collect(),
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

/// The loss as a multiple of that of dense layers.
fn against_dense(trial: &Trial, rows: &[Row]) -> String {
    let dense = rows.iter().find(|row| row.name == "dense").and_then(|row| row.best.as_ref().ok());
    dense.map_or_else(String::new, |dense| format!("{:.3} x", trial.loss / dense.loss))
}

fn settings(method: &ParameterizationMethod, rank: u64, steps: u64) -> Vec<String> {
    let has = |name: &str| method.options.iter().any(|(option, ..)| *option == name);
    let third = (steps / 3).max(1);
    let mut settings = Vec::new();
    if has("rank") {
        settings.push(format!("model.parameterization.options.rank={rank}"));
    }
    for cycle in ["reset_every", "exact_every"].into_iter().filter(|cycle| has(cycle)) {
        settings.push(format!("model.parameterization.options.{cycle}={third}"));
        settings.push(format!("model.parameterization.options.restart_warmup={}", third / 10));
    }
    settings
}
