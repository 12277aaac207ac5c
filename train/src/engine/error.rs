//! What can stop training.

use lowrank_models::ModelError;
use lowrank_models::adapter::AdapterError;
use lowrank_optim::OptimError;

use crate::data::DataError;

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
    #[error("step {step}: no token of the batch counts towards the loss")]
    NoTargets {
        /// The step.
        step: u64,
    },
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
