//! Allocation of a configuration, and its hook.

use burn::module::Module;
use lowrank_models::adapter::{AdapterConfig, Allocation, AllocationHook, AllocationRun, Rates, linear_weights};
use lowrank_optim::Hook;

use super::{BuildError, Listener};
use crate::config::{AllocationSection, Config};
use crate::engine::{BackwardMode, Schedule};
use crate::process::Peers;

/// Allocation of the configuration, if it names one.
pub fn allocation(section: &AllocationSection) -> Result<Option<Box<dyn Allocation>>, BuildError> {
    match section.name.as_str() {
        "none" => Ok(None),
        name => Ok(Some(<dyn Allocation>::named(name, &section.options)?)),
    }
}

/// The schedule of a run over what is left of it. A warm-up that does not end within it takes the share of it that it takes of the run.
fn rest(schedule: &Schedule, left: Option<u64>) -> Schedule {
    let mut rest = Schedule { total_steps: left, ..schedule.clone() };
    if let (Some(left), Some(total)) = (left, schedule.total_steps)
        && rest.warmup_steps >= left
    {
        rest.warmup_steps = rest.warmup_steps * left / total.max(1);
    }
    rest
}

/// Hook of an allocation for a stage of a run, which has `before` steps before it. Rejects what the layers of the model,
/// the optimizer or the length of the stage do not allow.
pub fn allocation_hook<M: Module>(
    config: &Config,
    allocation: &dyn Allocation,
    adapter: &AdapterConfig,
    model: &M,
    schedule: &Schedule,
    (stage, before): (usize, u64),
    listener: &dyn Listener,
) -> Result<AllocationHook, BuildError> {
    let rates = schedule.clone();
    let run = AllocationRun {
        adapter: adapter.name.clone(),
        seed: config.train.seed,
        before,
        stage,
        // The clock may end a run at any step.
        total_steps: schedule.total_steps.filter(|_| config.train.minutes == 0.0),
        micro_batches: (config.train.accumulation * Peers::of_process().size()) as u64,
        // The schedule counts from 1, so that its first rate is above 0; that of new parameters begins at 0 and ends with
        // the run.
        rates: Rates::new(move |step, total| match step {
            0 => 0.0,
            _ => rest(&rates, total.map(|total| total.saturating_sub(1))).rate(step),
        }),
    };
    if let (Some(reason), false) = (allocation.needs_one_process(), Peers::of_process().is_alone()) {
        return Err(BuildError::Settings(format!(
            "allocation.name = {}: not supported with several processes: {reason}; start one, with train.accumulation in place of processes",
            allocation.name()
        )));
    }
    let layers: Vec<_> = linear_weights(model)?.into_values().collect();
    let layers = adapter.places(&layers)?;
    allocation.check_optimizer(&config.optimizer.name)?;
    allocation.check(&run, &layers)?;
    allocation.warnings(&run, &layers).iter().for_each(|warning| listener.warn(warning));
    let hook = AllocationHook::new(allocation, &run);
    if config.train.backward == BackwardMode::PerLayer
        && let Some(reason) = Hook::<M>::needs_all_gradients(&hook)
    {
        return Err(BuildError::Settings(format!(
            "train.backward = per-layer: allocation {} needs all gradients at once, {reason}; set it to whole or checkpointed",
            allocation.name()
        )));
    }
    hook.look(model);
    Ok(hook)
}
