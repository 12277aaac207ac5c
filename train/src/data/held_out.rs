//! The part of the data that is not learned from.

use super::Source;

/// The part of the data that a model is measured on.
#[derive(Clone, Debug, PartialEq)]
pub enum HeldOut {
    /// A part of the data, between 0 and 1, chosen by the seed.
    Fraction(f64),
    /// Other data.
    Source(Source),
    /// All of it: nothing is learned from.
    Everything,
}
