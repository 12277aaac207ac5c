//! Objectives that cannot be.

/// An error of an objective or its streams.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ObjectiveError {
    /// Nothing to minimise.
    #[error("the objective has no term; give it at least one")]
    Empty,
    /// A weight that is no number or zero.
    #[error("the weight of the term on stream \"{stream}\" is {weight}; it must be a number other than 0")]
    Weight {
        /// The stream.
        stream: String,
        /// The weight.
        weight: f64,
    },
    /// A stream that is not there.
    #[error("the objective needs the stream \"{stream}\"; there are {known}: add it, or take its term away")]
    Stream {
        /// The stream.
        stream: String,
        /// The streams that are there.
        known: String,
    },
}
