//! Checkpoints of a trainer: model, optimizer, hooks and progress.

use std::path::{Path, PathBuf};

use lowrank_models::SegmentedModel;
use lowrank_optim::StateMeter;

use super::shards::{load_shard, save_shards, send_shard};
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
        state.optimizer_tensors = match trainer.shards() {
            Some(shards) => save_shards(trainer.optimizer(), meter, shards, dir)?,
            None => save_optimizer(trainer.optimizer(), meter, dir)?,
        };
        state.hook_tensors = save_hooks(trainer.hooks(), meter, dir)?;
        Ok(())
    })
}

/// Takes part in [`save_training`] of the first process, which receives the part of the state that this one has.
pub fn send_training<M: SegmentedModel>(trainer: &Trainer<M>, meter: &StateMeter) -> Result<(), CheckpointError> {
    match trainer.shards() {
        Some(shards) => send_shard(trainer.optimizer(), meter, shards),
        None => Ok(()),
    }
}

/// Restores the state at the checkpoint in a new trainer, whose model was read from it.
pub fn restore_training<M: SegmentedModel>(
    trainer: &mut Trainer<M>,
    meter: &StateMeter,
    checkpoint: &Path,
    state: &TrainerState,
) -> Result<(), CheckpointError> {
    let (optimizer, saved) = (trainer.optimizer().clone(), state.optimizer_tensors);
    *trainer.optimizer_mut() = match trainer.shards() {
        Some(shards) => load_shard(optimizer, meter, shards, checkpoint, saved)?,
        None => load_optimizer(optimizer, meter, checkpoint, saved)?,
    };
    load_hooks(trainer.hooks_mut(), meter, checkpoint, &state.hook_tensors)?;
    (trainer.step, trainer.samples, trainer.tokens) = (state.step, state.samples, state.tokens);
    trainer.skipped_steps = state.skipped_steps;
    Ok(())
}
