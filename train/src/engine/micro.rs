//! Batches of one micro-batch: one of each stream of the objective.

use burn::tensor::{Device, Tensor};
use lowrank_models::{ForwardPass, Segment, SegmentedModel, Walker, WeightedLoss, walk};

use super::TrainError;
use crate::objective::{Objective, StreamBatch, Streams, Term};

/// One batch of each stream.
pub(super) struct MicroBatch<M: SegmentedModel> {
    batches: Vec<StreamBatch<M::Batch>>,
    /// Number of losses of each term.
    pub counted: Vec<u64>,
}

impl<M: SegmentedModel> MicroBatch<M> {
    /// Reads micro-batch `number` of a step, after the first stream, in batches of `batch` rows, has provided `samples`
    /// rows before the step.
    pub fn read(
        objective: &Objective<M>,
        streams: &Streams<'_, M::Batch>,
        [samples, batch, number]: [u64; 3],
        device: &Device,
    ) -> Result<Self, TrainError> {
        let (mut batches, mut counted) = (Vec::new(), Vec::new());
        for (place, terms) in objective.by_stream().enumerate() {
            let stream = streams.get(&terms[0].stream)?;
            let rows = stream.batch() as u64;
            // The other streams advance by as many batches as the first.
            let before = if place == 0 { samples } else { samples / batch * rows };
            let read = stream.at(before + number * rows, device)?;
            counted.extend(terms.iter().map(|term| term.loss.counted(&read)));
            batches.push(read);
        }
        Ok(Self { batches, counted })
    }

    /// Losses of each term, over micro-batches.
    pub fn counted_in(micro: &[Self]) -> Vec<u64> {
        let terms = micro.first().map_or(0, |micro| micro.counted.len());
        (0..terms).map(|term| micro.iter().map(|micro| micro.counted[term]).sum()).collect()
    }

    /// Sum of the losses of each term, shape `[1]`, by a forward pass of each stream.
    pub fn losses(&self, objective: &Objective<M>, model: &M) -> Vec<Tensor<1>> {
        let streams = objective.by_stream().zip(&self.batches);
        streams
            .flat_map(|(terms, batch)| {
                let hidden = model.last_hidden(&batch.batch);
                terms.iter().map(move |term| term.loss.sum(model, hidden.clone(), batch))
            })
            .collect()
    }

    /// Runs the backward pass block by block for the sum of all terms with these factors and returns the sum of the
    /// losses of each.
    pub fn walk<W: Walker<M>>(
        &self,
        objective: &Objective<M>,
        factors: &[f64],
        lowest: Segment,
        walker: &mut W,
    ) -> Result<Vec<f64>, W::Error> {
        let mut factors = factors.iter();
        let losses: Vec<Vec<_>> = objective
            .by_stream()
            .zip(&self.batches)
            .map(|(terms, batch)| {
                let loss = |term: &Term<M>| {
                    let loss = term.loss.clone();
                    move |model: &M, x: M::Hidden| loss.sum(model, x, batch)
                };
                terms.iter().map(loss).collect()
            })
            .collect();
        let passes: Vec<ForwardPass<'_, M>> = self
            .batches
            .iter()
            .zip(&losses)
            .map(|(batch, losses)| ForwardPass {
                batch: &batch.batch,
                losses: losses
                    .iter()
                    .zip(factors.by_ref())
                    .map(|(loss, factor)| WeightedLoss { sum: loss, factor: *factor })
                    .collect(),
            })
            .collect();
        walk(&passes, lowest, walker)
    }
}
