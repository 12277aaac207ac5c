//! Checkpoint that a run resumes from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::module::Module;
use lowrank_kernels::instructions::{VARIABLE, instruction_set};
use lowrank_models::adapter::{self, StepOf};

use super::RunError;
use super::checkpoint::{Checkpoints, StageRecord, TrainerState};
use super::clock::Clock;
use crate::build::{BuildError, Listener, model_folder, names_adapter_folder};
use crate::config::{Config, Job};
use crate::engine::Schedule;
use crate::process::Peers;

/// Checkpoint that a run resumes from.
pub(super) struct Loaded {
    pub path: PathBuf,
    pub state: TrainerState,
}

/// Loads the newest checkpoint of a run, or the named one, with its state. Rejects a run that was started with other
/// settings.
pub(super) fn load(
    checkpoints: &Checkpoints,
    from: Option<&str>,
    config: &Config,
    dir: &Path,
    listener: &dyn Listener,
) -> Result<Loaded, RunError> {
    checkpoints.clean()?;
    let path = match from {
        Some(name) => checkpoints.named(name).map_err(RunError::Damaged)?,
        None => match checkpoints.newest().map_err(RunError::Damaged)? {
            Some(path) => path,
            None => return Err(RunError::NoCheckpoint { path: dir.to_path_buf() }),
        },
    };
    let state = TrainerState::read(&path).map_err(RunError::Damaged)?;
    let now = settings(config);
    let differences = differences(&by_step(&state.settings), &by_step(&now));
    if !differences.is_empty() {
        return Err(RunError::OtherSettings { path: dir.to_path_buf(), differences: differences.join("\n") });
    }
    warn_of_other_instructions(&state, listener);
    let [before, now] = [&state.settings, &now].map(in_turn);
    if before != now {
        listener.warn(
            "the micro-batches of a step are divided otherwise than at the checkpoint: sums are taken in another order, and results may differ in their last bits",
        );
    }
    Ok(Loaded { path, state })
}

/// Number of processes, and of the micro-batches of each.
fn division(settings: &BTreeMap<String, String>) -> [u64; 2] {
    [PROCESSES, ACCUMULATION].map(|key| settings.get(key).and_then(|count| count.parse().ok()).unwrap_or(1))
}

/// Settings with the micro-batches of a step of all processes, which may be divided otherwise when a run is resumed.
fn by_step(settings: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let micro_batches = division(settings).iter().product::<u64>().to_string();
    let mut settings = settings.clone();
    settings.remove(PROCESSES);
    settings.remove(ACCUMULATION);
    settings.insert(format!("{ACCUMULATION} x {PROCESSES}"), micro_batches);
    settings
}

/// Division that the order of sums depends on; none if they are taken in the order of the micro-batches.
fn in_turn(settings: &BTreeMap<String, String>) -> Option<[u64; 2]> {
    Some(division(settings)).filter(|division| !division.contains(&1))
}

/// Number of processes of a run of several.
const PROCESSES: &str = "processes";
/// Number of micro-batches of each.
const ACCUMULATION: &str = "train.accumulation";

/// Warns if the results may differ bitwise from those of the processor that the run was started on.
fn warn_of_other_instructions(state: &TrainerState, listener: &dyn Listener) {
    let (before, now) = (&state.instruction_set, instruction_set());
    if !before.is_empty() && before != now.name() {
        listener.warn(&format!(
            "the checkpoint was saved with the instruction set {before}, this process uses {now}: results may differ in their last bits; set \
             {VARIABLE}={before} to keep them where the processor has it"
        ));
    }
}

/// Settings that determine the result. Paths of data and models are not among them, since their contents are hashed,
/// and neither is the length, which [`steps`] compares.
pub(super) fn settings(config: &Config) -> BTreeMap<String, String> {
    let mut entries = config.deciding_entries();
    let hashed = [
        ("data.path", true),
        ("data.validation", true),
        ("tokenizer.path", true),
        ("model.name", config.run.job == Job::Finetune || model_folder(&config.model).is_some()),
        ("adapter.name", names_adapter_folder(&config.adapter)),
        ("train.steps", true),
        ("train.tokens", true),
        ("train.epochs", true),
    ];
    for (key, _) in hashed.into_iter().filter(|(_, free)| *free) {
        entries.remove(key);
    }
    let peers = Peers::of_process();
    if !peers.is_alone() {
        // The rows of a step and the order of its sums.
        entries.insert(PROCESSES.into(), peers.size().to_string());
    }
    entries
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

/// Hashes of the folders that a run starts from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bases {
    /// Hash of the model folder.
    pub model: Option<String>,
    /// Hash of the adapter folder.
    pub adapter: Option<String>,
}

/// Rejects data or folders whose contents have changed since the run was started.
pub(super) fn refuse_changed(
    state: &TrainerState,
    stages: &[StageRecord],
    bases: &Bases,
    config: &Config,
) -> Result<(), BuildError> {
    let refuse = |reason: String| Err(BuildError::Settings(reason));
    let names = |stages: &[StageRecord]| stages.iter().map(|stage| stage.name.clone()).collect::<Vec<_>>().join(", ");
    if names(&state.stages) != names(stages) {
        return refuse(format!(
            "the run has the stages {}, not {}; resume it with its own recipe",
            names(&state.stages),
            names(stages)
        ));
    }
    let changed = |key: &str, place: String, what: &str, flag: &str| {
        refuse(format!(
            "{key} = {place}: {what} changed since the run began; bring it back, name its new place with {flag}, or start a new run"
        ))
    };
    let paths = || config.data.path.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
    for (before, now) in state.stages.iter().zip(stages) {
        if before.data != now.data {
            return changed("data.path", paths(), "what the model learns from", "--data");
        }
        if before.held_out != now.held_out {
            return changed("data.path", paths(), "what is held out to measure on", "--data");
        }
    }
    // Stages that are over.
    for (before, now) in state.stages.iter().zip(stages).take(state.stage) {
        if before.steps != now.steps {
            return Err(other_length(before.steps, now.steps, &format!("the stage {} is over", before.name)));
        }
    }
    if state.base != bases.model {
        return changed("model.name", config.model.name.clone(), "the model in this folder", "--model");
    }
    if state.adapter != bases.adapter {
        return changed("adapter.name", config.adapter.name.clone(), "the adapter in this folder", "--adapter");
    }
    Ok(())
}

/// Steps of the current stage's schedule: as before, or a different number if it would not have changed any step so
/// far. The steps of a run with a time limit depend on the time that is left.
pub(super) fn steps(
    state: &TrainerState,
    planned: Option<u64>,
    clock: Option<Clock>,
    schedule: &dyn Fn(Option<u64>) -> Result<Schedule, BuildError>,
) -> Result<Option<u64>, BuildError> {
    let before = state.stages.get(state.stage).and_then(|stage| stage.steps);
    let done = state.step - state.stage_step;
    if planned == before {
        return Ok(match (clock, planned, state.total_steps) {
            (None, ..) => planned,
            // The time was up, and the limit has been raised. The last steps may have ended a little before the time.
            (Some(clock), Some(planned), Some(total))
                if total <= done && clock.is_longer_than(state.minutes) && !clock.is_over(state.seconds) =>
            {
                Some(planned.min(clock.fitting(state.step, state.seconds).saturating_sub(state.stage_step)))
            }
            (Some(_), ..) => state.total_steps,
        });
    }
    let (old, new) = (schedule(state.total_steps)?, schedule(planned)?);
    match (1..=done).find(|step| old.rate(*step) != new.rate(*step)) {
        None => Ok(planned),
        Some(step) => Err(other_length(
            before,
            planned,
            &format!(
                "the learning rate of step {step} would have been {:.3e} instead of {:.3e}",
                new.rate(step),
                old.rate(step)
            ),
        )),
    }
}

/// Rejects a different length if adapters change at a fraction of the run and would have changed at a different step.
pub(super) fn refuse_other_rests<M: Module>(
    state: &TrainerState,
    model: &M,
    planned: Option<u64>,
    total: Option<u64>,
) -> Result<(), BuildError> {
    let before = state.stages.get(state.stage).and_then(|stage| stage.steps);
    let frozen = |step: u64, steps: Option<u64>| {
        let total = steps.map(|steps| steps + state.stage_step);
        adapter::frozen_this_step(model, StepOf { step, total })
    };
    if total == state.total_steps {
        return Ok(());
    }
    match (state.stage_step..state.step).find(|step| frozen(*step, state.total_steps) != frozen(*step, total)) {
        None => Ok(()),
        Some(step) => {
            Err(other_length(before, planned, &format!("step {} would have trained other tensors", step + 1)))
        }
    }
}

fn other_length(before: Option<u64>, now: Option<u64>, reason: &str) -> BuildError {
    let steps = |steps: Option<u64>| steps.map_or("no fixed number of steps".into(), |steps| format!("{steps} steps"));
    BuildError::Settings(format!(
        "train.steps: the run was started for {}, and {} would have given it another past: {reason}; resume it with its own length, from an earlier checkpoint with --resume-from, or start a new run from its weights with --model CHECKPOINT",
        steps(before),
        steps(now)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_may_be_divided_otherwise_and_their_order_shows_where_sums_differ() {
        let of = |processes: u64, accumulation: u64| {
            let mut settings = BTreeMap::from([(ACCUMULATION.to_string(), accumulation.to_string())]);
            if processes > 1 {
                settings.insert(PROCESSES.to_string(), processes.to_string());
            }
            settings
        };
        assert!(differences(&by_step(&of(4, 1)), &by_step(&of(2, 2))).is_empty());
        assert_eq!(
            differences(&by_step(&of(4, 1)), &by_step(&of(3, 1))),
            ["  train.accumulation x processes = 4 (now 3)"]
        );
        assert_eq!((in_turn(&of(4, 1)), in_turn(&of(1, 4)), in_turn(&of(2, 2))), (None, None, Some([2, 2])));
    }

    #[test]
    fn a_run_that_the_clock_ended_takes_no_step_more_until_it_has_more_time() {
        let record = StageRecord { steps: Some(1000), ..StageRecord::default() };
        // The steps that were estimated to fit ended a tenth of a second before the time.
        let state = TrainerState {
            step: 10,
            seconds: 2.9,
            minutes: 0.05,
            total_steps: Some(10),
            stages: vec![record],
            ..TrainerState::default()
        };
        let total = |minutes: f64| {
            let unused = |_| unreachable!("the planned steps are the same");
            steps(&state, Some(1000), Clock::new(minutes, state.seconds), &unused).unwrap()
        };
        assert_eq!((total(0.05), total(0.04)), (Some(10), Some(10)));
        assert_eq!(total(0.1), Some(20));
        assert_eq!(total(0.0), Some(1000));
    }
}
