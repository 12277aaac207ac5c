//! One run, in a process of its own.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::build::BuildError;
use crate::run::checkpoint::Checkpoints;
use crate::run::report::Summary;

/// A run that ended well.
pub struct Trial {
    pub lr: f64,
    pub loss: f64,
    pub summary: Summary,
    pub folder: PathBuf,
}

/// A run that gave no result.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub reason: String,
    /// Whether the settings were refused, rather than something failing on the way.
    pub refused: bool,
}

/// How a run ended; broken off with its exit code when a signal stopped it.
pub type Ended = ControlFlow<ExitCode, Result<Trial, Failure>>;

/// What is kept of a run that ended, so that it is not repeated, nor taken for one with other settings.
#[derive(Serialize, Deserialize)]
struct Record {
    command: Vec<String>,
    /// Why it failed on its way.
    failure: Option<String>,
}

/// Trains, or goes on, or reads what came out where that was done before.
pub fn trial(command: &[String], lr: f64, folder: &Path) -> anyhow::Result<Ended> {
    let mut command = command.to_vec();
    command.extend(["--lr".into(), lr.to_string()]);
    let kept = folder.join("trial.json");
    if kept.exists() {
        let record: Record = read(&kept)?;
        if record.command != command {
            return Err(BuildError::Settings(format!(
                "{} was run as `lowrank {}`, not as `lowrank {}`; take another --out",
                folder.display(),
                record.command.join(" "),
                command.join(" ")
            ))
            .into());
        }
        return ended(record.failure, lr, folder);
    }
    let mut process = Command::new(std::env::current_exe().context("cannot find this program")?);
    process.args(&command).arg("--quiet").arg("--out").arg(folder);
    if folder.join("config.toml").exists() {
        let (checkpoint, _) = Checkpoints::new(folder.join("checkpoints"), 1, false).newest_good()?;
        match checkpoint {
            Some(_) => {
                process.arg("--resume");
            }
            // Killed before there was anything to go on with.
            None => {
                std::fs::remove_dir_all(folder).with_context(|| format!("cannot begin {} anew", folder.display()))?
            }
        }
    }
    let output = process.output().context("cannot start this program")?;
    let told = String::from_utf8_lossy(&output.stderr);
    let reason = told.trim().rsplit("error: ").next().unwrap_or_default().to_string();
    let failure = match output.status.code() {
        Some(0) => None,
        Some(1) => Some(reason),
        Some(2) => return Ok(Ended::Continue(Err(Failure { reason, refused: true }))),
        Some(code) if code > 128 => return Ok(Ended::Break(ExitCode::from(code as u8))),
        _ => anyhow::bail!("{}: the run ended with {}: {reason}", folder.display(), output.status),
    };
    let record = Record { command, failure };
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&kept, serde_json::to_string_pretty(&record)?))
        .with_context(|| format!("cannot write {}", kept.display()))?;
    ended(record.failure, lr, folder)
}

fn ended(failure: Option<String>, lr: f64, folder: &Path) -> anyhow::Result<Ended> {
    if let Some(reason) = failure {
        return Ok(Ended::Continue(Err(Failure { reason, refused: false })));
    }
    let summary: Summary = read(&folder.join("summary.json"))?;
    Ok(Ended::Continue(match summary.validation_loss.filter(|loss| loss.is_finite()) {
        Some(loss) => Ok(Trial { lr, loss, summary, folder: folder.to_path_buf() }),
        None => Err(Failure { reason: "the validation loss is not finite".into(), refused: false }),
    }))
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
}
