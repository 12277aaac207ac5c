//! Interface of the configurations of optimizers.

use burn::config::Config;
use burn::optim::Optimizer;

use crate::error::OptimError;
use crate::matrix_id::MatrixId;
use crate::methods::adamw::{AdamW, AdamWConfig};

/// Interface of the configuration of an optimizer.
pub trait MethodConfig: Config {
    /// The bare optimizer.
    type Optimizer: Optimizer;

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
