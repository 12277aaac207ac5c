//! Interface of a penalty.

use std::fmt::Debug;
use std::ops::Deref;

use burn::tensor::Tensor;
use lowrank_optim::registry::{Entry, Options, Registered};

use crate::ground::error::AdapterError;

/// A penalty on one matrix, with its options.
pub trait MatrixPenalty: Debug + Send + Sync {
    /// Value for a matrix, shape `[1]`, differentiable in it; none if the options switch it off.
    fn of(&self, matrix: Tensor<2>) -> Option<Tensor<1>>;
}

/// Registry entry of a penalty.
#[derive(Debug)]
pub struct PenaltyEntry {
    /// Description of the penalty.
    pub entry: Entry,
    /// Reads the penalty with the given options on top of its defaults.
    pub read: fn(&Options) -> Result<Box<dyn MatrixPenalty>, AdapterError>,
}

impl Deref for PenaltyEntry {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Registered for PenaltyEntry {
    fn entry(&self) -> &Entry {
        &self.entry
    }
}
