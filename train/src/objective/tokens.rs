//! Streams of text.

use std::sync::Arc;

use burn::tensor::Device;
use lowrank_models::{LanguageBatch, ids_tensor};

use super::{Stream, StreamBatch};
use crate::data::{DataError, Samples};

/// Rows of tokens as batches of a language model.
#[derive(Clone)]
pub struct TokenStream {
    samples: Arc<dyn Samples>,
    document_mask: bool,
}

impl TokenStream {
    /// Creates a stream. With `document_mask` attention stays inside a document; otherwise it covers the whole row.
    pub fn new(samples: impl Samples + 'static, document_mask: bool) -> Self {
        Self { samples: Arc::new(samples), document_mask }
    }
}

impl Stream<LanguageBatch> for TokenStream {
    fn batch(&self) -> usize {
        self.samples.batch()
    }

    fn rows(&self) -> u64 {
        self.samples.rows()
    }

    fn at(&self, position: u64, device: &Device) -> Result<StreamBatch<LanguageBatch>, DataError> {
        let batch = self.samples.at(position)?;
        let tensor = |values: &[i32]| ids_tensor(values, batch.batch, device);
        // A row with a single document needs no mask.
        let masked = self.document_mask && batch.starts.iter().any(|start| *start != 0);
        Ok(StreamBatch {
            counted: batch.counted(),
            batch: LanguageBatch {
                inputs: tensor(&batch.inputs),
                targets: tensor(&batch.targets),
                starts: masked.then(|| tensor(&batch.starts)),
            },
            tags: batch.tags,
        })
    }
}
