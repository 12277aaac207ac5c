//! Per-example gradients, by micro-batches of one row.

use burn::optim::GradientsParams;
use lowrank_models::{Rows, SegmentedModel};

use super::{Loss, StreamBatch};

/// Computes gradients of the mean loss of each row of a batch in turn: `each` receives the index of the row, its mean
/// loss and its gradients, which are dropped before those of the next row are computed. Rows whose targets are all
/// ignored are left out.
///
/// Forward and backward pass of a row are whole: they keep as much memory as for a batch of one row.
pub fn per_example_gradients<M: SegmentedModel, E>(
    model: &M,
    loss: &dyn Loss<M>,
    batch: &StreamBatch<M::Batch>,
    mut each: impl FnMut(usize, f64, GradientsParams) -> Result<(), E>,
) -> Result<(), E> {
    for row in 0..batch.batch.rows() {
        let one = batch.row::<M>(row);
        let counted = loss.counted(&one) as f64;
        if counted == 0.0 {
            continue;
        }
        let mean = loss.sum(model, model.last_hidden(&one.batch), &one).div_scalar(counted);
        let value = f64::from(mean.clone().inner().into_scalar::<f32>());
        each(row, value, GradientsParams::from_grads(mean.backward(), model))?;
    }
    Ok(())
}

impl<B: Rows> StreamBatch<B> {
    /// Returns one row of the batch with its tags.
    pub fn row<M: SegmentedModel<Batch = B>>(&self, row: usize) -> Self {
        let batch = self.batch.narrow(row, 1);
        let tags = self.tags.iter().filter(|tag| tag.row == row).map(|tag| tag.clone().in_row(0)).collect();
        Self { counted: M::counted(&batch), batch, tags }
    }
}
