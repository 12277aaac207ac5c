//! Checkpoints of a trainer: model, optimizer, hooks and progress.

use std::path::{Path, PathBuf};

use lowrank_models::SegmentedModel;
use lowrank_optim::StateMeter;

use super::{CheckpointError, Checkpoints, TrainerState, load_hooks, load_optimizer, save_hooks, save_optimizer};
use crate::engine::Trainer;
use crate::recipe::ModelFiles;

/// Saves a checkpoint of a trainer whose optimizer and hooks report to this meter. `state` is its remaining content.
pub fn save_training<M: SegmentedModel>(
    checkpoints: &Checkpoints,
    trainer: &Trainer<M>,
    files: &impl ModelFiles<M>,
    meter: &StateMeter,
    state: TrainerState,
) -> Result<PathBuf, CheckpointError> {
    let (step, samples, tokens, skipped_steps) = (trainer.step, trainer.samples, trainer.tokens, trainer.skipped_steps);
    let state = TrainerState { step, samples, tokens, skipped_steps, ..state };
    checkpoints.save(state, |dir, state| {
        files.save(trainer.model(), dir).map_err(|error| CheckpointError::Files(Box::new(error)))?;
        state.optimizer_tensors = save_optimizer(trainer.optimizer(), meter, dir)?;
        state.hook_tensors = save_hooks(trainer.hooks(), meter, dir)?;
        Ok(())
    })
}

/// Restores the state at the checkpoint in a new trainer, whose model was read from it.
pub fn restore_training<M: SegmentedModel>(
    trainer: &mut Trainer<M>,
    meter: &StateMeter,
    checkpoint: &Path,
    state: &TrainerState,
) -> Result<(), CheckpointError> {
    let optimizer = trainer.optimizer_mut();
    *optimizer = load_optimizer(optimizer.clone(), meter, checkpoint, state.optimizer_tensors)?;
    load_hooks(trainer.hooks_mut(), meter, checkpoint, &state.hook_tensors)?;
    (trainer.step, trainer.samples, trainer.tokens) = (state.step, state.samples, state.tokens);
    trainer.skipped_steps = state.skipped_steps;
    Ok(())
}
