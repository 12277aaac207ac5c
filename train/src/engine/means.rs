//! Mean losses of a step: sums over all micro-batches divided by the number of losses in them.

use lowrank_models::{Segment, SegmentedModel, Walker};
use lowrank_optim::StepInfo;

use super::micro::MicroBatch;
use super::report::StepReport;
use crate::objective::Objective;

/// Objective of a step, and the number of losses of each term.
pub(super) struct Means<'a, M: SegmentedModel> {
    pub objective: &'a Objective<M>,
    pub counted: &'a [u64],
}

impl<M: SegmentedModel> Means<'_, M> {
    /// Divisor of each term's sum.
    pub fn divisors(&self) -> impl Iterator<Item = f64> {
        self.objective.terms().iter().zip(self.counted).map(|(term, counted)| *counted as f64 / term.weight)
    }

    /// Runs the backward pass of a micro-batch block by block and returns the sum of the losses of each term.
    pub fn walk<W: Walker<M>>(
        &self,
        batches: &MicroBatch<M>,
        lowest: Segment,
        walker: &mut W,
    ) -> Result<Vec<f64>, W::Error> {
        let factors = self
            .objective
            .terms()
            .iter()
            .zip(self.counted)
            .map(|(term, counted)| term.weight * (1.0 / *counted as f64));
        batches.walk(self.objective, &factors.collect::<Vec<_>>(), lowest, walker)
    }

    /// Creates a report of the losses alone.
    pub fn report(&self, step: &StepInfo, sums: &[f64]) -> StepReport {
        let terms: Vec<f64> = sums.iter().zip(self.counted).map(|(sum, counted)| sum / *counted as f64).collect();
        StepReport {
            step: step.step,
            loss: self.objective.terms().iter().zip(&terms).map(|(term, mean)| term.weight * mean).sum(),
            terms,
            lr: step.lr,
            grad_norm: f64::NAN,
            gradient_bytes: 0,
            activation_bytes: None,
            tokens: self.counted.iter().sum(),
            seconds: 0.0,
            data_seconds: 0.0,
            sent_bytes: 0,
            communication_seconds: 0.0,
            skipped: false,
        }
    }
}
