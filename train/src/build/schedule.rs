//! The learning rate of a run.

use lowrank_models::Parameterization;

use super::BuildError;
use super::model::parameterizations;
use crate::config::Config;
use crate::engine::{Restarts, Schedule, ScheduleKind};

/// Returns the schedule of the configuration for a run of a given number of steps, which must fit the restarts of the
/// parameterization.
pub fn schedule(
    config: &Config,
    parameterization: &Parameterization,
    total_steps: Option<u64>,
) -> Result<Schedule, BuildError> {
    let section = &config.schedule;
    let warmup_steps = config.warmup_steps(total_steps);
    let name = parameterization.name();
    let refuse = |reason: String| Err(BuildError::Settings(reason));
    let jagged = section.kind == ScheduleKind::CosineRestarts;
    let restarts = match parameterization.method().restarts() {
        Some(plan) if plan.every <= warmup_steps && !plan.in_warmup => {
            return refuse(format!(
                "model.parameterization.options.{} = {}: the first restart would come inside the {warmup_steps} steps of schedule.warmup_steps; raise one or lower the other",
                parameterization.spec().period.unwrap_or(name),
                plan.every
            ));
        }
        Some(plan) if plan.needs_zero_rate && !jagged => {
            return refuse(format!(
                "schedule.kind with {name}: a restart needs a learning rate that falls to 0 and comes back; set schedule.kind=cosine-restarts"
            ));
        }
        Some(plan) => Restarts {
            every: plan.every,
            warmup_steps: plan.warmup_steps,
            adjust_steps: section.adjust_steps,
            in_warmup: plan.in_warmup,
        },
        None if jagged => {
            return refuse(format!(
                "schedule.kind = cosine-restarts: {name} has no restarts; parameterizations with restarts: {}",
                parameterizations(|spec| spec.period.is_some())
            ));
        }
        None => Restarts::default(),
    };
    if jagged && section.final_fraction == 0.0 {
        return refuse(
            "schedule.final_fraction = 0: it must be greater than 0 with schedule.kind = cosine-restarts".into(),
        );
    }
    if !jagged && section.adjust_steps > 0 {
        return refuse(
            "schedule.adjust_steps is not supported without schedule.kind = cosine-restarts; remove it".into(),
        );
    }
    Ok(Schedule {
        kind: section.kind,
        peak: config.optimizer.lr,
        warmup_steps,
        total_steps,
        final_fraction: section.final_fraction,
        decay_fraction: section.decay_fraction,
        restarts,
    })
}
