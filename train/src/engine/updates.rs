//! Model with its optimizer and hooks.

use burn::optim::{GradientsParams, ModuleOptimizer};
use lowrank_models::{Segment, SegmentedModel};
use lowrank_optim::{Hooks, Part, StepInfo};

use super::TrainError;
use super::shards::Shards;

/// Model, its optimizer and its hooks.
pub(super) struct Updates<M: SegmentedModel> {
    // None while the optimizer owns the model, so that the update can happen in place.
    model: Option<M>,
    pub optimizer: ModuleOptimizer,
    pub hooks: Hooks<M>,
    /// Division of the optimizer's state among processes, if it is divided.
    pub shards: Option<Shards>,
}

impl<M: SegmentedModel> Updates<M> {
    pub fn new(model: M, optimizer: ModuleOptimizer, hooks: Hooks<M>) -> Self {
        Self { model: Some(model), optimizer, hooks, shards: None }
    }

    pub fn model(&self) -> &M {
        match &self.model {
            Some(model) => model,
            None => unreachable!("the model is back after every update"),
        }
    }

    /// Sets the model that the step begins with.
    pub fn replace(&mut self, model: M) {
        self.model = Some(model);
    }

    /// Rejects hooks that need the states of all parameters if they are divided.
    pub fn check_states(&self) -> Result<(), TrainError> {
        match self.hooks.needs_all_states() {
            Some((hook, reason)) if self.shards.is_some() => Err(TrainError::AllStates { hook, reason }),
            _ => Ok(()),
        }
    }

    /// Runs the hooks before the forward pass of a step.
    pub fn begin_step(&mut self, step: &StepInfo) -> Result<(), TrainError> {
        let Some(model) = &self.model else { return Ok(()) };
        self.hooks.begin_step(step, model).map_err(TrainError::hook)
    }

    /// Passes the gradients of a segment, or of the whole model, to the hooks before clipping.
    pub fn before_clipping(
        &mut self,
        step: &StepInfo,
        segment: Option<Segment>,
        grads: GradientsParams,
    ) -> Result<GradientsParams, TrainError> {
        let Some(model) = &self.model else { return Ok(grads) };
        with_part(model, segment, |part| self.hooks.before_clipping(step, part, grads)).map_err(TrainError::hook)
    }

    /// Updates a segment, or the whole model, with the clipped gradients.
    pub fn update(
        &mut self,
        step: &StepInfo,
        segment: Option<Segment>,
        grads: GradientsParams,
    ) -> Result<(), TrainError> {
        let Some(model) = &self.model else { return Ok(()) };
        let grads = with_part(model, segment, |part| self.hooks.after_clipping(step, part, grads));
        let grads = grads.map_err(TrainError::hook)?;
        if let Some(model) = self.model.take() {
            let model = self.hooks.before_update(step, model);
            let model = match &mut self.shards {
                Some(shards) => shards.step(&mut self.optimizer, step.lr, model, grads),
                None => self.optimizer.step(step.lr, model, grads),
            };
            self.hooks.after_update(step, self.model.insert(model)).map_err(TrainError::hook)?;
        }
        Ok(())
    }

    /// Runs the hooks after the update of a step, or after skipping it.
    pub fn end_step(&mut self, step: &StepInfo) {
        if let Some(model) = self.model.take() {
            self.model = Some(self.hooks.end_step(step, model, &mut self.optimizer));
        }
    }
}

/// Passes a segment of a model, or the whole model, to a function.
fn with_part<M: SegmentedModel, R>(model: &M, segment: Option<Segment>, work: impl FnOnce(&dyn Part) -> R) -> R {
    match segment {
        Some(segment) => work(&segment.of(model)),
        None => work(model),
    }
}
