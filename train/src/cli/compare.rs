//! `lowrank compare`.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context;
use lowrank_optim::registry::{METHODS, Method, find};
use serde_json::Value;

use super::print;
use crate::job::JobError;
use crate::run::{Screen, bytes};

/// Train the same model with several optimizers and compare them, each at its best learning rate.
///
/// Each run is one of `lowrank pretrain` in a folder of its own below --out; runs that are finished are not repeated, so a comparison that was
/// stopped goes on where it was. When the best learning rate is the smallest or the largest one, the next one on that side is tried too.
///
/// Matrices inside the model learn at a quarter of the rate of the embedding, the head and the norms, which is GaLore's scale, with every optimizer
/// that has such a setting; at twice that rate where their updates are orthogonal.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lowrank compare --steps 400
  lowrank compare adamw dct-adamw galore --rank 64 --set model.hidden_size=256")]
pub struct Args {
    /// Optimizers to compare; none: all of `lowrank methods`
    optimizers: Vec<String>,
    /// Steps of each run
    #[arg(long, default_value_t = 400)]
    steps: u64,
    /// Rank of the optimizers that have one; a quarter of the smaller side is what most papers take
    #[arg(long, default_value_t = 32)]
    rank: u64,
    /// Learning rates to try; none: three about the usual one of each optimizer
    #[arg(long, value_delimiter = ',')]
    lr: Vec<f64>,
    /// Further settings of all runs, as in `lowrank pretrain`
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Folder of the runs
    #[arg(long, default_value = "runs/compare")]
    out: PathBuf,
    /// Show no progress
    #[arg(long)]
    quiet: bool,
}

/// Most learning rates that are tried for one optimizer.
const MOST: usize = 6;

/// A run that ended.
struct Trial {
    lr: f64,
    loss: f64,
    state: u64,
    seconds: f64,
}

/// Runs, and prints the table.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let methods: Vec<&Method> = match args.optimizers.is_empty() {
        true => METHODS.iter().collect(),
        false => args.optimizers.iter().map(|name| find(name).map_err(JobError::from)).collect::<Result<_, _>>()?,
    };
    let mut screen = Screen::new(args.quiet);
    let mut rows = Vec::new();
    for method in methods {
        let mut trials = Vec::new();
        let mut lrs = if args.lr.is_empty() { usual(method.name).to_vec() } else { args.lr.clone() };
        while let Some(lr) = lrs.pop() {
            screen.line(&format!("{} at learning rate {lr}", method.name));
            trials.push(trial(&args, method, lr)?);
            if lrs.is_empty() && args.lr.is_empty() && trials.len() < MOST {
                lrs.extend(further(&trials));
            }
        }
        trials.sort_by(|a, b| a.loss.total_cmp(&b.loss));
        let best = trials.swap_remove(0);
        screen.line(&format!("{}: best {:.4} at {}", method.name, best.loss, best.lr));
        rows.push((method.name, best, trials.len() + 1));
    }
    screen.end();
    let table = table(&rows);
    std::fs::write(args.out.join("compare.md"), &table)
        .with_context(|| format!("cannot write {}", args.out.join("compare.md").display()))?;
    print(&table)?;
    Ok(ExitCode::SUCCESS)
}

/// Three learning rates about the one that the method's paper takes for small models.
fn usual(method: &str) -> [f64; 3] {
    match method {
        "muon" | "trion" | "dion" => [0.005, 0.02, 0.06],
        _ => [0.003, 0.01, 0.03],
    }
}

/// The next learning rate, where the best one is the last on its side.
fn further(trials: &[Trial]) -> Option<f64> {
    let best = trials.iter().min_by(|a, b| a.loss.total_cmp(&b.loss))?.lr;
    let smallest = trials.iter().map(|trial| trial.lr).fold(f64::INFINITY, f64::min);
    let largest = trials.iter().map(|trial| trial.lr).fold(0.0, f64::max);
    let digits = |lr: f64| format!("{lr:.2e}").parse().ok();
    match best {
        _ if best == smallest => digits(smallest / 3.0),
        _ if best == largest => digits(largest * 3.0),
        _ => None,
    }
}

fn trial(args: &Args, method: &Method, lr: f64) -> anyhow::Result<Trial> {
    let out = args.out.join(format!("{}-{lr}", method.name));
    let has = |name: &str| method.options().iter().any(|option| option.name == name);
    let summary = out.join("summary.json");
    if !summary.exists() {
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        command.args(["pretrain", "--quiet", "--out"]).arg(&out);
        command.args(["--optimizer", method.name, "--lr", &lr.to_string(), "--steps", &args.steps.to_string()]);
        let mut settings = vec!["eval.every=0".to_string(), "log.sample_every=0".into(), "log.every=10".into()];
        // FRUGAL takes a share, a quarter as the others at this rank; one direction is what APOLLO-Mini is.
        if has("rank") && !has("density") && method.name != "apollo-mini" {
            settings.push(format!("optimizer.rank={}", args.rank));
        }
        // As GaLore's scale has it: what small models learn best with is a larger rate for the embedding than for the matrices.
        for scale in ["lr_scale", "proj_lr_scale"].into_iter().filter(|scale| has(scale)) {
            settings.push(format!("optimizer.{scale}=0.25"));
        }
        // Orthogonal updates are of another size than Adam's; the rest learns at about the rate that it has with the others.
        if has("others_lr_scale") {
            settings.push("optimizer.others_lr_scale=0.5".into());
        }
        for setting in settings.iter().chain(&args.set) {
            command.args(["--set", setting]);
        }
        if out.join("config.toml").exists() {
            command.arg("--resume");
        }
        let output = command.output().context("cannot start this program")?;
        if !output.status.success() && output.status.code() != Some(1) {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
            return Err(JobError::Settings(format!("{} at {lr}: {text}", method.name)).into());
        }
    }
    read(&summary, lr)
}

/// What a run tells; one that ended in a failure, which is an infinite or undefined loss, counts as infinitely bad.
fn read(path: &Path, lr: f64) -> anyhow::Result<Trial> {
    let Ok(text) = std::fs::read_to_string(path) else {
        return Ok(Trial { lr, loss: f64::INFINITY, state: 0, seconds: f64::NAN });
    };
    let value: Value = serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?;
    let number = |key: &str| value[key].as_f64().unwrap_or(f64::NAN);
    Ok(Trial {
        lr,
        loss: value["validation_loss"].as_f64().unwrap_or(f64::INFINITY),
        state: value["optimizer_state_bytes"].as_u64().unwrap_or(0),
        seconds: number("tokens") / number("steps") / number("tokens_per_second"),
    })
}

fn table(rows: &[(&str, Trial, usize)]) -> String {
    let mut text =
        String::from("| optimizer | validation loss | learning rate (tried) | state | step |\n|---|---|---|---|---|\n");
    for (name, best, tried) in rows {
        text.push_str(&format!(
            "| {name} | {:.4} | {} ({tried}) | {} | {:.0} ms |\n",
            best.loss,
            best.lr,
            bytes(best.state),
            1e3 * best.seconds
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trials(losses: &[(f64, f64)]) -> Vec<Trial> {
        losses.iter().map(|(lr, loss)| Trial { lr: *lr, loss: *loss, state: 0, seconds: 0.1 }).collect()
    }

    #[test]
    fn a_best_rate_at_the_edge_asks_for_the_next() {
        assert_eq!(further(&trials(&[(0.001, 3.0), (0.003, 4.0), (0.01, 5.0)])), Some(0.000333));
        assert_eq!(further(&trials(&[(0.001, 5.0), (0.003, 4.0), (0.01, 3.0)])), Some(0.03));
        assert_eq!(further(&trials(&[(0.001, 5.0), (0.003, 3.0), (0.01, 4.0)])), None);
    }
}
