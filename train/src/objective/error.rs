//! Errors of objectives.

/// Error of an objective or its streams.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ObjectiveError {
    /// Objective without terms.
    #[error("the objective has no term; give it at least one")]
    Empty,
    /// Weight that is zero or not a number.
    #[error("the weight of the term on stream \"{stream}\" is {weight}; it must be a number other than 0")]
    Weight {
        /// Name of the stream.
        stream: String,
        /// Value of the weight.
        weight: f64,
    },
    /// Missing stream.
    #[error("the objective needs the stream \"{stream}\"; there are {known}: add it, or take its term away")]
    Stream {
        /// Name of the stream.
        stream: String,
        /// Existing streams.
        known: String,
    },
}
