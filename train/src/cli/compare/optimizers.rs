//! `lowrank compare optimizers`.

use std::process::ExitCode;

use lowrank_optim::registry::{METHODS, Method, optimizer as find};

use super::common::Common;
use super::comparison::{Comparison, chosen};
use super::search::Contender;
use super::table::{STATE, STEP};
use crate::build::BuildError;

/// Pretrain the same model with several optimizers.
///
/// When the best learning rate is the smallest or the largest one, the next one on that side is tried too.
///
/// Matrices inside the model learn at a quarter of the rate of the embedding, the head and the norms, which is GaLore's scale, with every optimizer
/// that has such a setting; at twice that rate where their updates are orthogonal.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lowrank compare optimizers --steps 400
  lowrank compare optimizers adamw dct-adamw galore --rank 64 --set model.hidden_size=256")]
pub struct Args {
    /// Optimizers to compare; none: all of `lowrank methods`
    names: Vec<String>,
    /// Steps of each run
    #[arg(long, default_value_t = 400)]
    steps: u64,
    /// Rank of the optimizers that have one; a quarter of the smaller side is what most papers take
    #[arg(long, default_value_t = 32)]
    rank: u64,
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let methods = chosen(&args.names, METHODS.iter(), |name| Ok(find(name).map_err(BuildError::from)?))?;
    let contender = |method: &'static Method| {
        let mut command = pretraining(method.name, args.steps);
        command.extend(settings(method, args.rank).into_iter().flat_map(|setting| ["--set".into(), setting]));
        Contender { name: method.name, lrs: usual(method), command }
    };
    let comparison = Comparison {
        what: "optimizer",
        folder: "compare-optimizers",
        contenders: methods.into_iter().map(contender).collect(),
        most: 6,
        columns: vec![STATE, STEP],
    };
    comparison.run(&args.common)
}

/// Command line of a pretraining run that reports only its result.
pub fn pretraining(optimizer: &str, steps: u64) -> Vec<String> {
    let steps = steps.to_string();
    let quiet = ["eval.every=0", "log.sample_tokens=0", "log.every=10"];
    let words = ["pretrain", "--optimizer", optimizer, "--steps", &steps];
    words.into_iter().chain(quiet.into_iter().flat_map(|setting| ["--set", setting])).map(String::from).collect()
}

/// Three learning rates around the one that the method's paper uses for small models.
pub fn usual(optimizer: &Method) -> Vec<f64> {
    optimizer.lr.map_or_else(|| vec![0.003, 0.01, 0.03], |lr| vec![lr / 4.0, lr, 3.0 * lr])
}

fn settings(method: &Method, rank: u64) -> Vec<String> {
    let options = method.options();
    let has = |name: &str| options.get(name).is_some();
    let mut settings = Vec::new();
    // A method with a density uses a quarter of the gradient, like the others at this rank; one of rank 1 does so by
    // definition.
    let own =
        options.get("rank").is_some_and(|rank| rank.default.as_ref().and_then(serde_json::Value::as_u64) == Some(1));
    if has("rank") && !has("density") && !own {
        settings.push(format!("optimizer.options.rank={rank}"));
    }
    // As with GaLore's scale: small models train best with a larger learning rate for the embedding than for the
    // matrices.
    for scale in ["lr_scale", "proj_lr_scale"].into_iter().filter(|scale| has(scale)) {
        settings.push(format!("optimizer.options.{scale}=0.25"));
    }
    // Orthogonal updates differ in size from Adam's; all other parameters train at about the same rate as with the
    // other optimizers.
    if has("others_lr_scale") {
        settings.push("optimizer.options.others_lr_scale=0.5".into());
    }
    settings
}
