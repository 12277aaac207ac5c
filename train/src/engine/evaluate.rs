//! Loss on held-out text.

use lowrank_models::SegmentedModel;

use super::TrainError;
use crate::data::DataError;
use crate::objective::{Loss, StreamBatch};
use crate::process::Peers;

/// Result of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Sum of the cross-entropies in nats.
    pub nats: f64,
    /// Number of predicted tokens.
    pub tokens: u64,
}

impl Evaluation {
    /// Mean cross-entropy in nats per token.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// Perplexity: `exp` of the mean cross-entropy.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Bits needed for each byte of a text of `text_bytes` bytes.
    pub fn bits_per_byte(&self, text_bytes: u64) -> f64 {
        self.nats / std::f64::consts::LN_2 / text_bytes as f64
    }
}

/// Token-weighted loss over batches. Continues until `each`, which is called after every batch, returns false.
pub fn evaluate<M: SegmentedModel>(
    model: &M,
    loss: &dyn Loss<M>,
    batches: impl Iterator<Item = Result<StreamBatch<M::Batch>, DataError>>,
    mut each: impl FnMut(&Evaluation) -> bool,
) -> Result<Evaluation, TrainError> {
    let model = model.valid();
    let mut total = Evaluation { nats: 0.0, tokens: 0 };
    for batch in batches {
        let batch = batch?;
        let sum = loss.sum(&model, model.last_hidden(&batch.batch), &batch);
        total.nats += f64::from(sum.into_scalar::<f32>());
        total.tokens += loss.counted(&batch);
        if !each(&total) {
            break;
        }
    }
    Ok(total)
}

/// Token-weighted loss over `count` batches, which processes compute in turns. Sums are taken in the order of the batches,
/// so that the loss does not depend on the number of processes.
pub fn evaluate_together<M: SegmentedModel>(
    peers: Peers,
    model: &M,
    loss: &dyn Loss<M>,
    count: usize,
    batch: impl Fn(usize) -> Result<StreamBatch<M::Batch>, DataError>,
) -> Result<Evaluation, TrainError> {
    let model = model.valid();
    let mut own = vec![[0.0; 2]; count.div_ceil(peers.size())];
    for (turn, [nats, tokens]) in own.iter_mut().enumerate() {
        let number = turn * peers.size() + peers.rank();
        if number < count {
            let batch = batch(number)?;
            let sum = loss.sum(&model, model.last_hidden(&batch.batch), &batch);
            *nats = f64::from(sum.into_scalar::<f32>());
            *tokens = loss.counted(&batch) as f64;
        }
    }
    let all = peers.all_pairs(&own);
    let in_order = (0..count).map(|number| all[number % peers.size()][number / peers.size()]);
    Ok(in_order.fold(Evaluation { nats: 0.0, tokens: 0 }, |total, [nats, tokens]| Evaluation {
        nats: total.nats + nats,
        tokens: total.tokens + tokens as u64,
    }))
}
