//! The model in Burn's own training loop.

use burn::tensor::{ExecutionError, Tensor};
use burn::train::metric::{Adaptor, LossInput};
use burn::train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};

use super::batch::LanguageBatch;
use super::model::Llama;
use crate::ops::IGNORE;

/// Result of a training or validation step, for Burn's metrics.
#[derive(Clone, Debug)]
pub struct LanguageOutput {
    /// Mean cross-entropy in nats over the targets that count, shape `[1]`.
    pub loss: Tensor<1>,
}

impl ItemLazy for LanguageOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        let device = self.loss.device();
        Ok(Self { loss: Tensor::from_data(self.loss.into_data(), &device) })
    }
}

impl Adaptor<LossInput> for LanguageOutput {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl Llama {
    /// Mean cross-entropy in nats over the targets that count, shape `[1]`; not a number when none counts.
    pub fn mean_loss(&self, batch: LanguageBatch) -> Tensor<1> {
        let counted = batch.targets.clone().not_equal_elem(IGNORE).int().sum().float();
        self.loss_sum(batch.inputs, batch.targets, batch.starts) / counted
    }
}

impl TrainStep for Llama {
    type Input = LanguageBatch;
    type Output = LanguageOutput;

    fn step(&self, batch: LanguageBatch) -> TrainOutput<LanguageOutput> {
        let loss = self.mean_loss(batch);
        let output = LanguageOutput { loss: loss.clone().inner() };
        TrainOutput::new(self, loss.backward(), output)
    }
}

impl InferenceStep for Llama {
    type Input = LanguageBatch;
    type Output = LanguageOutput;

    fn step(&self, batch: LanguageBatch) -> LanguageOutput {
        LanguageOutput { loss: self.mean_loss(batch) }
    }
}
