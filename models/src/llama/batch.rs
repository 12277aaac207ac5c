//! Batches of text.

use burn::tensor::{Device, Int, Tensor};

use crate::ops::IGNORE;
use crate::segments::Rows;

/// A batch of token ids with the targets of each position.
#[derive(Clone, Debug)]
pub struct LanguageBatch {
    /// Token ids `[batch, positions]`.
    pub inputs: Tensor<2, Int>,
    /// The token after each position `[batch, positions]`; [`IGNORE`] does not count.
    pub targets: Tensor<2, Int>,
    /// First position of each position's document `[batch, positions]`; none when every row is one document.
    pub starts: Option<Tensor<2, Int>>,
}

impl LanguageBatch {
    /// Moves the batch to a device.
    pub fn to_device(self, device: &Device) -> Self {
        Self {
            inputs: self.inputs.to_device(device),
            targets: self.targets.to_device(device),
            starts: self.starts.map(|starts| starts.to_device(device)),
        }
    }
    /// Number of targets that count; waits for the device.
    pub fn counted(&self) -> u64 {
        self.targets.clone().not_equal_elem(IGNORE).int().sum().into_scalar::<i64>() as u64
    }
}

impl Rows for LanguageBatch {
    fn rows(&self) -> usize {
        self.inputs.dims()[0]
    }

    fn narrow(&self, start: usize, count: usize) -> Self {
        let rows = |ids: &Tensor<2, Int>| ids.clone().narrow(0, start, count);
        Self { inputs: rows(&self.inputs), targets: rows(&self.targets), starts: self.starts.as_ref().map(rows) }
    }
}
