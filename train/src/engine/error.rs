//! Errors that stop training.

use lowrank_models::ModelError;
use lowrank_models::adapter::AdapterError;
use lowrank_optim::{HookError, OptimError};

use crate::data::DataError;
use crate::objective::ObjectiveError;

/// Error of the training engine.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Loss that is infinite or not a number.
    #[error(
        "step {step}: the loss is {loss}; nothing was updated. Lower optimizer.lr, lengthen the warm-up, or allow some such steps with train.max_skipped_steps"
    )]
    Loss {
        /// Step that was not taken.
        step: u64,
        /// Value of the loss.
        loss: f64,
    },
    /// Gradient that is infinite or not a number.
    #[error(
        "step {step}: {source}; nothing was updated. Lower optimizer.lr, lengthen the warm-up, or allow some such steps with train.max_skipped_steps"
    )]
    Gradient {
        /// Step that was not taken.
        step: u64,
        /// Error that names the parameter.
        source: OptimError,
    },
    /// Gradient that is infinite or not a number, after the blocks above it have been updated.
    #[error(
        "step {step}: {source}; the blocks above it are updated already: resume from the last checkpoint, with a lower optimizer.lr or a longer warm-up"
    )]
    BlockGradient {
        /// Step that was not completed.
        step: u64,
        /// Error that names the parameter.
        source: OptimError,
    },
    /// Gradient accumulation while blocks are updated one by one.
    #[error(
        "{count} micro-batches a step: with train.backward = per-layer a block is updated before the next micro-batch; set train.accumulation=1"
    )]
    Accumulation {
        /// Number of micro-batches.
        count: usize,
    },
    /// Failure of a gradient rule or the optimizer.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// Processes with gradients of different parameters.
    #[error(
        "rank {rank} has {count} values of gradients where rank 0 has {first}: its micro-batch reaches other parameters; train in one process with train.accumulation in place of ranks"
    )]
    OtherGradients {
        /// The process.
        rank: usize,
        /// Number of its values.
        count: u64,
        /// Number of values of the first process.
        first: u64,
    },
    /// Model without trained parameters.
    #[error("no tensor of the model is trained: put an adapter on it, or train its weights")]
    NothingTrained,
    /// Error of an adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Step in which all targets are ignored.
    #[error("step {step}: no token of the batch of stream \"{stream}\" counts towards the loss")]
    NoTargets {
        /// Number of the step.
        step: u64,
        /// Name of the stream.
        stream: String,
    },
    /// Hook that needs all gradients at once while blocks are updated one by one.
    #[error("{hook} needs all gradients at once: {reason}; set train.backward to whole or checkpointed")]
    AllGradients {
        /// Name of the hook.
        hook: &'static str,
        /// Reason of the hook.
        reason: String,
    },
    /// Hook that needs the states of all parameters while they are divided among processes.
    #[error("train.shard_state = true: {hook} needs all optimizer state in every process: {reason}; set it to false")]
    AllStates {
        /// Name of the hook.
        hook: &'static str,
        /// Reason of the hook.
        reason: String,
    },
    /// Failure of a hook.
    #[error("{0}")]
    Hook(HookError),
    /// Invalid objective.
    #[error(transparent)]
    Objective(#[from] ObjectiveError),
    /// Trainable tensors that the first update did not change.
    #[error(
        "the first update did not move {count} trainable tensors, the first of them {names}: they get no gradient or belong to no optimizer"
    )]
    NotMoved {
        /// Number of these tensors.
        count: usize,
        /// Names of the first few.
        names: String,
    },
    /// Unreadable data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Error of the model.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl TrainError {
    /// Converts the error of a hook, keeping its type if known.
    pub(super) fn hook(error: HookError) -> Self {
        match error.downcast::<AdapterError>() {
            Ok(error) => Self::Adapter(*error),
            Err(error) => match error.downcast::<OptimError>() {
                Ok(error) => Self::Optim(*error),
                Err(error) => Self::Hook(error),
            },
        }
    }
}
