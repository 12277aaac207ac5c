//! Losses on streams, and their weighted sum.

use std::fmt;
use std::sync::Arc;

use burn::tensor::Tensor;
use lowrank_models::SegmentedModel;

use super::error::ObjectiveError;
use super::stream::{MAIN, StreamBatch};

/// Loss on the hidden states of a model, or on the logits computed from them.
pub trait Loss<M: SegmentedModel>: Send + Sync {
    /// Sum of all losses, shape `[1]`, from the output of the last block.
    fn sum(&self, model: &M, hidden: M::Hidden, batch: &StreamBatch<M::Batch>) -> Tensor<1>;

    /// Number of losses in that sum, the divisor of the mean.
    fn counted(&self, batch: &StreamBatch<M::Batch>) -> u64 {
        batch.counted
    }
}

/// Loss of the model itself: for a language model the cross-entropy of the next token, over the targets that the stream
/// counts.
#[derive(Clone, Copy, Debug)]
pub struct ModelLoss;

impl<M: SegmentedModel> Loss<M> for ModelLoss {
    fn sum(&self, model: &M, hidden: M::Hidden, batch: &StreamBatch<M::Batch>) -> Tensor<1> {
        model.loss(hidden, &batch.batch)
    }
}

impl<M, F> Loss<M> for F
where
    M: SegmentedModel,
    F: Fn(&M, M::Hidden, &StreamBatch<M::Batch>) -> Tensor<1> + Send + Sync,
{
    fn sum(&self, model: &M, hidden: M::Hidden, batch: &StreamBatch<M::Batch>) -> Tensor<1> {
        self(model, hidden, batch)
    }
}

/// Loss with its stream and its weight.
pub struct Term<M: SegmentedModel> {
    /// Name of the stream of its batches.
    pub stream: String,
    /// Factor of the mean loss; a negative factor maximises it.
    pub weight: f64,
    /// The loss.
    pub loss: Arc<dyn Loss<M>>,
}

impl<M: SegmentedModel> Term<M> {
    /// Creates a term of a stream.
    pub fn new(stream: impl Into<String>, weight: f64, loss: impl Loss<M> + 'static) -> Self {
        Self { stream: stream.into(), weight, loss: Arc::new(loss) }
    }
}

impl<M: SegmentedModel> Clone for Term<M> {
    fn clone(&self) -> Self {
        Self { stream: self.stream.clone(), weight: self.weight, loss: self.loss.clone() }
    }
}

impl<M: SegmentedModel> fmt::Debug for Term<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Term").field("stream", &self.stream).field("weight", &self.weight).finish_non_exhaustive()
    }
}

/// Weighted sum of mean losses, each over its own tokens.
#[derive(Clone, Debug)]
pub struct Objective<M: SegmentedModel> {
    /// Terms, grouped by stream.
    terms: Vec<Term<M>>,
}

impl<M: SegmentedModel> Default for Objective<M> {
    /// Uses the model's own loss on the stream [`MAIN`].
    fn default() -> Self {
        Self { terms: vec![Term::new(MAIN, 1.0, ModelLoss)] }
    }
}

impl<M: SegmentedModel> Objective<M> {
    /// Creates the sum of these terms. Terms of one stream share its forward pass.
    pub fn new(terms: Vec<Term<M>>) -> Result<Self, ObjectiveError> {
        if terms.is_empty() {
            return Err(ObjectiveError::Empty);
        }
        if let Some(term) = terms.iter().find(|term| !term.weight.is_finite() || term.weight == 0.0) {
            return Err(ObjectiveError::Weight { stream: term.stream.clone(), weight: term.weight });
        }
        let mut together: Vec<Term<M>> = Vec::with_capacity(terms.len());
        for term in terms {
            let place = together.iter().rposition(|other| other.stream == term.stream);
            together.insert(place.map_or(together.len(), |place| place + 1), term);
        }
        Ok(Self { terms: together })
    }

    /// Terms, grouped by stream.
    pub fn terms(&self) -> &[Term<M>] {
        &self.terms
    }

    /// Terms of each stream.
    pub fn by_stream(&self) -> impl Iterator<Item = &[Term<M>]> {
        self.terms.chunk_by(|a, b| a.stream == b.stream)
    }
}
