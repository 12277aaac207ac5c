//! The part of the data that is not trained on.

use super::Source;

/// Part of the data that a model is validated on.
#[derive(Clone, Debug, PartialEq)]
pub enum HeldOut {
    /// Fraction of the data, between 0 and 1, chosen by the seed.
    Fraction(f64),
    /// Other data.
    Source(Source),
    /// All of the data: there is no training.
    Everything,
}
