//! A single run in a process of its own.

use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::build::BuildError;
use crate::process::files::write_whole;
use crate::process::{Signals, send};
use crate::run::RunError;
use crate::run::checkpoint::Checkpoints;
use crate::run::report::{EndedBy, Summary};

/// Run that ended well.
pub struct Trial {
    pub lr: f64,
    pub loss: f64,
    pub summary: Summary,
    pub folder: PathBuf,
}

/// Run without a result.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub reason: String,
    /// True if the settings were rejected, rather than the run failing later.
    pub refused: bool,
}

/// Outcome of a run; breaks with its exit code if a signal stopped it.
pub type Ended = ControlFlow<ExitCode, Result<Trial, Failure>>;

/// Record next to a run of how it was started and whether it ended, so that it is neither repeated nor confused with
/// one with other settings.
#[derive(Serialize, Deserialize)]
struct Record {
    command: Vec<String>,
    /// True if it ended by itself.
    ended: bool,
    /// Reason for a failure during the run.
    failure: Option<String>,
}

/// Name of the record's file.
const RECORD: &str = "trial.json";

/// Trains, resumes, or reads the result of an earlier process.
pub fn trial(command: &[String], lr: f64, folder: &Path, signals: &Signals) -> anyhow::Result<Ended> {
    let mut command = command.to_vec();
    command.extend(["--lr".into(), lr.to_string()]);
    let place = folder.join(RECORD);
    if place.exists() {
        let record: Record = read(&place)?;
        if record.command != command {
            return Err(BuildError::Settings(format!(
                "{} was run as `lowrank {}`, not as `lowrank {}`; take another --out",
                folder.display(),
                record.command.join(" "),
                command.join(" ")
            ))
            .into());
        }
        if record.ended {
            return ended(record.failure, lr, folder);
        }
    }
    if let Some(signal) = signals.requested() {
        return Ok(Ended::Break(ExitCode::from(signal.exit_code() as u8)));
    }
    let mut process = Command::new(std::env::current_exe().context("cannot find this program")?);
    process.args(&command).arg("--quiet").arg("--out").arg(folder);
    // A run without this record is not ours, and `lowrank` refuses to modify it.
    if place.exists() && folder.join("config.toml").exists() {
        let checkpoints = Checkpoints::new(folder.join("checkpoints"), 1, false).list().map_err(RunError::from)?;
        // The run was killed before its first checkpoint.
        process.arg(if checkpoints.is_empty() { "--overwrite" } else { "--resume" });
    }
    note(&place, &Record { command: command.clone(), ended: false, failure: None })?;
    let (status, stderr) = watched(process, signals)?;
    if let Some(signal) = signals.requested() {
        return Ok(Ended::Break(ExitCode::from(signal.exit_code() as u8)));
    }
    let reason = stderr.trim().rsplit("error: ").next().unwrap_or_default().to_string();
    let failure = match status.code() {
        Some(0) => None,
        Some(1) => Some(reason),
        Some(2) => {
            remove_note(&place, folder);
            return Ok(Ended::Continue(Err(Failure { reason, refused: true })));
        }
        Some(code) if code > 128 => return Ok(Ended::Break(ExitCode::from(code as u8))),
        _ => anyhow::bail!("{}: the run ended with {status}: {reason}", folder.display()),
    };
    let record = Record { command, ended: true, failure };
    note(&place, &record)?;
    ended(record.failure, lr, folder)
}

/// Runs a process to its end and forwards the first signal that asks this process to end; also returns its output.
fn watched(mut process: Command, signals: &Signals) -> anyhow::Result<(ExitStatus, String)> {
    process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // The process has its own group, so that Ctrl-C on a terminal reaches it once, through here: a second signal would
    // end it before it has saved.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut process, 0);
    let mut child = process.spawn().context("cannot start this program")?;
    let mut stderr = child.stderr.take().context("the program has no error stream")?;
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        let _ = stderr.read_to_end(&mut said);
        String::from_utf8_lossy(&said).into_owned()
    });
    let mut passed_on = false;
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait for the program")? {
            break status;
        }
        if let Some(signal) = signals.requested().filter(|_| !passed_on) {
            passed_on = true;
            if !send(child.id(), signal) {
                child.kill().context("cannot stop the program")?;
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    Ok((status, reader.join().unwrap_or_default()))
}

fn note(place: &Path, record: &Record) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(record)?;
    let parent = place.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)
        .and_then(|()| write_whole(place, text.as_bytes()))
        .with_context(|| format!("cannot write {}", place.display()))
}

/// Removes the record of a rejected run, and its folder if that contains nothing else.
fn remove_note(place: &Path, folder: &Path) {
    // A failure to remove it is harmless.
    let _ = std::fs::remove_file(place);
    let mut inside = std::fs::read_dir(folder).into_iter().flatten().flatten();
    if inside.all(|entry| entry.file_name() == "lock") {
        let _ = std::fs::remove_file(folder.join("lock"));
        let _ = std::fs::remove_dir(folder);
    }
}

fn ended(failure: Option<String>, lr: f64, folder: &Path) -> anyhow::Result<Ended> {
    let failed = |reason: String| Ok(Ended::Continue(Err(Failure { reason, refused: false })));
    if let Some(reason) = failure {
        return failed(reason);
    }
    let summary: Summary = read(&folder.join("summary.json"))?;
    if summary.ended_by == Some(EndedBy::Clock) {
        return failed(format!(
            "train.minutes ended it after {} steps, and only runs of equal length can be compared; set train.minutes=0",
            summary.steps
        ));
    }
    match summary.final_validation_loss.filter(|loss| loss.is_finite()) {
        Some(loss) => Ok(Ended::Continue(Ok(Trial { lr, loss, summary, folder: folder.to_path_buf() }))),
        None => failed("the validation loss is not finite".into()),
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
}
