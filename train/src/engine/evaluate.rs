//! Loss on held-out text.

use burn::module::Module;
use lowrank_models::Llama;

use super::{TrainError, batch_tensors};
use crate::data::{Batch, DataError};

/// What an evaluation found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Sum of the cross-entropies in nats.
    pub nats: f64,
    /// Number of predicted tokens.
    pub tokens: u64,
}

impl Evaluation {
    /// Mean cross-entropy in nats a token.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// `exp` of the mean cross-entropy.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Bits needed for each byte of a text of so many bytes.
    pub fn bits_per_byte(&self, text_bytes: u64) -> f64 {
        self.nats / std::f64::consts::LN_2 / text_bytes as f64
    }
}

/// Token-weighted loss over batches; with `document_mask` attention stays inside a document. Goes on until `each`, which is called after every batch, returns false.
pub fn evaluate(
    model: &Llama,
    batches: impl Iterator<Item = Result<Batch, DataError>>,
    document_mask: bool,
    mut each: impl FnMut(&Evaluation) -> bool,
) -> Result<Evaluation, TrainError> {
    let model = model.valid();
    let device = model.model.norm.weight.val().device();
    let mut total = Evaluation { nats: 0.0, tokens: 0 };
    for batch in batches {
        let batch = batch?;
        let tensors = batch_tensors(&batch, document_mask, &device);
        total.nats += f64::from(model.loss_sum(tensors.inputs, tensors.targets, tensors.starts).into_scalar::<f32>());
        total.tokens += batch.counted();
        if !each(&total) {
            break;
        }
    }
    Ok(total)
}
