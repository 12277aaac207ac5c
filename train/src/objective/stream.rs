//! Named streams of batches.

use std::collections::BTreeMap;

use burn::tensor::Device;

use super::ObjectiveError;
use crate::data::{DataError, Tag};

/// Name of the main stream, by which a run counts its samples.
pub const MAIN: &str = "train";
/// Name of the stream whose batches hooks search with and no step learns from.
pub const SEARCH: &str = "search";

/// Batch of a stream.
#[derive(Clone, Debug)]
pub struct StreamBatch<B> {
    /// Batch in the form that the model uses.
    pub batch: B,
    /// Number of losses that the model's own loss sums over it.
    pub counted: u64,
    /// Fields of its examples, if the stream keeps any.
    pub tags: Vec<Tag>,
}

/// Rows in the order of a run.
pub trait Stream<B> {
    /// Rows of a batch.
    fn batch(&self) -> usize;

    /// Number of rows in one epoch.
    fn rows(&self) -> u64;

    /// The rows `position..position + batch`, counted from 0 over the whole run, on a device; data that is read once
    /// ends with a smaller batch.
    fn at(&self, position: u64, device: &Device) -> Result<StreamBatch<B>, DataError>;
}

/// The batches of one epoch.
pub fn epoch<'a, B>(
    stream: &'a dyn Stream<B>,
    device: &'a Device,
) -> impl Iterator<Item = Result<StreamBatch<B>, DataError>> + 'a {
    (0..stream.rows()).step_by(stream.batch()).map(|position| stream.at(position, device))
}

/// Streams of a run by name.
pub struct Streams<'a, B>(BTreeMap<&'a str, &'a dyn Stream<B>>);

impl<'a, B> From<&'a dyn Stream<B>> for Streams<'a, B> {
    fn from(stream: &'a dyn Stream<B>) -> Self {
        Self(BTreeMap::from([(MAIN, stream)]))
    }
}

impl<'a, B> Streams<'a, B> {
    /// Creates a single stream with the name [`MAIN`].
    pub fn one(stream: &'a dyn Stream<B>) -> Self {
        stream.into()
    }

    /// Adds a stream.
    pub fn with(mut self, name: &'a str, stream: &'a dyn Stream<B>) -> Self {
        self.0.insert(name, stream);
        self
    }

    /// Returns the stream with this name.
    pub fn get(&self, name: &str) -> Result<&'a dyn Stream<B>, ObjectiveError> {
        self.0.get(name).copied().ok_or_else(|| ObjectiveError::Stream {
            stream: name.to_string(),
            known: self.0.keys().copied().collect::<Vec<_>>().join(", "),
        })
    }
}
