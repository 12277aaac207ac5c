//! Interface of the configurations of optimizers.

use burn::config::Config;

use crate::change::WeightChange;
use crate::error::OptimError;
use crate::matrix_id::MatrixId;
use crate::methods::adamw::{AdamW, AdamWConfig};

/// Matrices at the ends of a model, which most methods leave to AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Maps ids to vectors.
    Embedding,
    /// Gives the outputs.
    Head,
    /// An embedding that is also the head.
    Tied,
}

/// Interface of the configuration of an optimizer.
pub trait MethodConfig: Config {
    /// The bare optimizer.
    type Optimizer: WeightChange;

    /// Rejects modules without a hidden matrix that the method can step.
    const NEEDS_MATRICES: bool = true;

    /// The bare optimizer, or the reason why the configuration is rejected.
    fn optimizer(&self) -> Result<Self::Optimizer, OptimError>;

    /// The optimizer of one matrix with this identity.
    fn at(optimizer: Self::Optimizer, place: MatrixId) -> Self::Optimizer;

    /// Reports whether the method steps matrices of this shape, instead of plain AdamW.
    fn takes(&self, shape: [usize; 2]) -> bool;

    /// AdamW of the same kind for everything else.
    fn others(&self) -> AdamWConfig;

    /// Bytes of state for a matrix of this shape.
    fn state_bytes(&self, shape: [usize; 2]) -> usize;

    /// Share of the hidden matrices that have their state at a time.
    fn active_share(&self) -> f64 {
        1.0
    }

    /// The optimizer of an embedding or head; none where AdamW steps it.
    fn of_table(&self, _table: Table) -> Option<Self::Optimizer> {
        None
    }

    /// Bytes of state for an embedding or head of this shape; none where AdamW steps it.
    fn table_bytes(&self, _table: Table, _shape: [usize; 2]) -> Option<usize> {
        None
    }
}

impl MethodConfig for AdamWConfig {
    type Optimizer = AdamW;

    const NEEDS_MATRICES: bool = false;

    fn optimizer(&self) -> Result<AdamW, OptimError> {
        self.validate()?;
        Ok(self.build())
    }

    fn at(optimizer: AdamW, _place: MatrixId) -> AdamW {
        optimizer
    }

    fn takes(&self, _shape: [usize; 2]) -> bool {
        true
    }

    fn others(&self) -> AdamWConfig {
        self.clone().with_lr_scale(1.0)
    }

    fn state_bytes(&self, [rows, columns]: [usize; 2]) -> usize {
        8 * rows * columns
    }
}
