//! What can stop training.

use lowrank_models::ModelError;
use lowrank_models::adapter::AdapterError;
use lowrank_optim::{HookError, OptimError};

use crate::data::DataError;
use crate::objective::ObjectiveError;

/// An error of the training engine.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The loss is infinite or not a number.
    #[error(
        "step {step}: the loss is {loss}; nothing was updated. Lower optimizer.lr, lengthen the warm-up, or allow some such steps with train.max_skipped_steps"
    )]
    Loss {
        /// The step that was not taken.
        step: u64,
        /// The loss.
        loss: f64,
    },
    /// A gradient is infinite or not a number.
    #[error(
        "step {step}: {source}; nothing was updated. Lower optimizer.lr, lengthen the warm-up, or allow some such steps with train.max_skipped_steps"
    )]
    Gradient {
        /// The step that was not taken.
        step: u64,
        /// Names the parameter.
        source: OptimError,
    },
    /// A gradient is infinite or not a number, and the blocks above it are updated already.
    #[error(
        "step {step}: {source}; the blocks above it are updated already: resume from the last checkpoint, with a lower optimizer.lr or a longer warm-up"
    )]
    BlockGradient {
        /// The step that was not completed.
        step: u64,
        /// Names the parameter.
        source: OptimError,
    },
    /// Micro-batches where blocks are updated one by one.
    #[error(
        "{count} micro-batches a step: with train.backward = per-layer a block is updated before the next micro-batch; set train.accumulation=1"
    )]
    Accumulation {
        /// How many.
        count: usize,
    },
    /// A gradient rule or the optimizer failed.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// Everything is frozen.
    #[error("no tensor of the model is trained: put an adapter on it, or train its weights")]
    NothingTrained,
    /// An adapter refused something.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// No target of a step counts.
    #[error("step {step}: no token of the batch of stream \"{stream}\" counts towards the loss")]
    NoTargets {
        /// The step.
        step: u64,
        /// The stream.
        stream: String,
    },
    /// Blocks are updated one by one, and a hook needs all gradients at once.
    #[error("{hook} needs all gradients at once: {reason}; set train.backward to whole or checkpointed")]
    AllGradients {
        /// The hook.
        hook: &'static str,
        /// Its reason.
        reason: String,
    },
    /// A hook failed.
    #[error("{0}")]
    Hook(HookError),
    /// The objective cannot be.
    #[error(transparent)]
    Objective(#[from] ObjectiveError),
    /// Trainable tensors that the first update left as they were.
    #[error(
        "the first update did not move {count} trainable tensors, the first of them {names}: they get no gradient or belong to no optimizer"
    )]
    NotMoved {
        /// How many.
        count: usize,
        /// The first few.
        names: String,
    },
    /// The data could not be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model refused something.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl TrainError {
    /// The error of a hook, as itself where its type is known.
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
