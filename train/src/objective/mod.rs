//! Objectives: the weighted sum of losses that a step minimises, and the named streams of batches that they are computed on.
//!
//! ```text
//! Stream (rows in the order of a run) -> StreamBatch -> model -> Loss of each term -> weighted sum of their means
//! ```

mod classification;
mod error;
mod per_example;
mod stream;
mod terms;
mod tokens;

pub use classification::{Classified, ImageStream, grid};
pub use error::ObjectiveError;
pub use per_example::per_example_gradients;
pub use stream::{MAIN, SEARCH, Stream, StreamBatch, Streams, epoch};
pub use terms::{Loss, ModelLoss, Objective, Term};
pub use tokens::TokenStream;
