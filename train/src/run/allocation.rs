//! Hook of the allocation of a run.

use lowrank_models::adapter::AllocationHook;

use super::report::Console;
use crate::build::{self, Architecture, BuildError};
use crate::config::Config;
use crate::engine::Schedule;
use crate::recipe::TrainedModel;

/// Hook of the run's allocation for a stage, if it has one.
pub(super) fn allocation_hook<M: Architecture>(
    config: &Config,
    subject: &TrainedModel<M>,
    model: &M,
    schedule: &Schedule,
    stage: (usize, u64),
    console: &Console,
) -> Result<Option<AllocationHook>, BuildError> {
    match (&subject.allocation, subject.adapter()) {
        (Some(allocation), Some(adapter)) => {
            build::allocation_hook(config, &**allocation, adapter, model, schedule, stage, console).map(Some)
        }
        _ => Ok(None),
    }
}
