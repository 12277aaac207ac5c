//! Initial values of a pair of factors.

use crate::ground::initialisation::Initialisation;
use crate::ground::site::{Place, Site};

/// Row-major factors `A [d_in, rank]` and `B [rank, d_out]`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
}

/// An initialisation of two factors.
pub(crate) struct FactorInit {
    pub about: Initialisation,
    /// Reason why a layer cannot have it.
    pub check: fn(&Place) -> Result<(), String>,
    pub start: fn(&Site<'_>) -> Start,
}
