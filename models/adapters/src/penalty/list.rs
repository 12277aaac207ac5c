//! List of penalties, one line each.

use lowrank_optim::registry::{Kind, Options, find};

use super::definition::{MatrixPenalty, PenaltyEntry};
use super::lambda_orthogonality;
use crate::ground::error::AdapterError;

/// All penalties on matrices of this crate.
pub static PENALTIES: &[&PenaltyEntry] = &[&lambda_orthogonality::ENTRY];

impl dyn MatrixPenalty {
    /// Returns the penalty with this name and the given options on top of its defaults.
    pub fn named(name: &str, options: &Options) -> Result<Box<Self>, AdapterError> {
        (find(Kind::Penalty, PENALTIES.iter().copied(), name)?.read)(options)
    }
}
