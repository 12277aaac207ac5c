//! Held-out rows for validation losses.

use std::num::NonZeroU64;

use burn::tensor::Device;
use lowrank_models::SegmentedModel;

use crate::data::Order;
use crate::engine::{Evaluation, TrainError, evaluate_together};
use crate::objective::{ModelLoss, Stream};
use crate::process::Peers;

/// Batches of the held-out rows, drawn once over all of them: every validation loss of a stage uses the same ones, so
/// that the losses are comparable.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Validation {
    /// First row of each batch, ascending; none for all batches.
    rows: Option<Vec<u64>>,
}

/// Separates the draw from the order of the training rows.
const STREAM: u64 = 0x76616c6964617465;

impl Validation {
    /// Draws `count` batches; 0 for all.
    pub fn draw<B>(held_out: &dyn Stream<B>, count: usize, seed: u64) -> Self {
        let batch = held_out.batch() as u64;
        let batches = held_out.rows().div_ceil(batch);
        let rows = NonZeroU64::new(batches).filter(|_| count > 0 && (count as u64) < batches).map(|batches| {
            let order = Order::new(batches, seed ^ STREAM);
            let mut rows: Vec<u64> = (0..count as u64).map(|position| order.window(position).1 * batch).collect();
            rows.sort_unstable();
            rows
        });
        Self { rows }
    }

    /// Computes the loss on the drawn batches, which processes share.
    pub fn drawn<M: SegmentedModel>(
        &self,
        peers: Peers,
        model: &M,
        held_out: &dyn Stream<M::Batch>,
        device: &Device,
    ) -> Result<Evaluation, TrainError> {
        match &self.rows {
            None => Self::all(peers, model, held_out, device),
            Some(rows) => {
                evaluate_together(peers, model, &ModelLoss, rows.len(), |number| held_out.at(rows[number], device))
            }
        }
    }

    /// Computes the loss on all batches, which processes share.
    pub fn all<M: SegmentedModel>(
        peers: Peers,
        model: &M,
        held_out: &dyn Stream<M::Batch>,
        device: &Device,
    ) -> Result<Evaluation, TrainError> {
        let batch = held_out.batch() as u64;
        let count = held_out.rows().div_ceil(batch) as usize;
        evaluate_together(peers, model, &ModelLoss, count, |number| held_out.at(number as u64 * batch, device))
    }

    /// First row of each drawn batch; none for all batches.
    pub fn starts(&self) -> Option<&[u64]> {
        self.rows.as_deref()
    }

    /// Returns true if the drawn batches are all that exist.
    pub fn is_all(&self) -> bool {
        self.rows.is_none()
    }
}

#[cfg(test)]
mod tests {
    use lowrank_models::LanguageBatch;

    use super::*;
    use crate::data::DataError;
    use crate::objective::StreamBatch;

    struct Rows(u64);

    impl Stream<LanguageBatch> for Rows {
        fn batch(&self) -> usize {
            4
        }

        fn rows(&self) -> u64 {
            self.0
        }

        fn at(&self, _: u64, _: &Device) -> Result<StreamBatch<LanguageBatch>, DataError> {
            unreachable!("nothing is read by drawing")
        }
    }

    #[test]
    fn batches_are_drawn_once_over_all_rows() {
        let draw = |count, seed| Validation::draw(&Rows(1001), count, seed).rows;
        let rows = draw(20, 1).unwrap();
        assert_eq!(rows.len(), 20);
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1]) && rows.iter().all(|row| row % 4 == 0 && *row < 1001));
        assert!(rows[19] > 500, "not the first ones: {rows:?}");
        assert_eq!(draw(20, 1), Some(rows.clone()));
        assert_ne!(draw(20, 2), Some(rows));
        assert_eq!(draw(0, 1), None);
        assert_eq!(draw(251, 1), None);
    }
}
