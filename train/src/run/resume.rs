//! The checkpoint that a run goes on from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lowrank_kernels::instructions::{VARIABLE, instruction_set};

use super::RunError;
use super::checkpoint::{Checkpoints, TrainerState};
use crate::build::{BuildError, Listener};
use crate::config::Config;
use crate::recipe::RunData;

/// The newest good checkpoint with its state. Warns of newer ones that are not good, and refuses one begun with other settings.
pub(super) fn newest(
    config: &Config,
    dir: &Path,
    listener: &dyn Listener,
) -> Result<Option<(PathBuf, TrainerState)>, RunError> {
    let (good, bad) = Checkpoints::new(dir.join("checkpoints"), 1, false).newest_good()?;
    let Some(path) = good else {
        // A run that was stopped before its first checkpoint begins anew; damaged checkpoints are another matter.
        if bad.is_empty() {
            return Ok(None);
        }
        let reasons: String = bad.iter().map(|error| format!("\n  {error}")).collect();
        return Err(RunError::NoCheckpoint { path: dir.to_path_buf(), reasons });
    };
    for reason in &bad {
        listener.warn(&format!("passing over a checkpoint: {reason}"));
    }
    let state = TrainerState::read(&path)?;
    let differences = differences(&state.settings, &config.deciding_entries());
    if !differences.is_empty() {
        return Err(RunError::OtherSettings { path: dir.to_path_buf(), differences: differences.join("\n") });
    }
    warn_of_other_instructions(&state, listener);
    Ok(Some((path, state)))
}

/// Warns where the bits may not be those of the processor that the run was started on.
fn warn_of_other_instructions(state: &TrainerState, listener: &dyn Listener) {
    let (before, now) = (&state.instruction_set, instruction_set());
    if !before.is_empty() && before != now.name() {
        listener.warn(&format!(
            "the checkpoint was saved with the instruction set {before}, this process uses {now}: results may differ in their last bits; set \
             {VARIABLE}={before} to keep them where the processor has it"
        ));
    }
}

/// Refuses data or a base model that are not those the run was started with.
pub(super) fn refuse_changed(
    state: &TrainerState,
    config: &Config,
    data: &RunData,
    base: Option<&str>,
) -> Result<(), BuildError> {
    let changed = |what: String| {
        Err(BuildError::Settings(format!("{what} changed since the run began; bring it back or start a new run")))
    };
    if state.data != data.fingerprint {
        return changed("what the model learns from".into());
    }
    if state.base.as_deref() != base {
        return changed(format!("the model in {}", config.model.name));
    }
    Ok(())
}

/// One line for each setting that differs.
fn differences(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let none = "unset".to_string();
    let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    keys.into_iter()
        .filter(|key| before.get(*key) != now.get(*key))
        .map(|key| format!("  {key} = {} (now {})", before.get(key).unwrap_or(&none), now.get(key).unwrap_or(&none)))
        .collect()
}
