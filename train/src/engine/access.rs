//! Parts of a trainer, and its stages.

use burn::optim::ModuleOptimizer;
use burn::tensor::Device;
use lowrank_models::SegmentedModel;
use lowrank_optim::Hooks;

use super::TrainError;
use super::schedule::Schedule;
use super::shards::Shards;
use super::trainer::Trainer;
use crate::objective::Objective;

impl<M: SegmentedModel> Trainer<M> {
    /// Divides the optimizer's state among processes. Rejects hooks that need all of it.
    pub fn with_shards(mut self, shards: Option<Shards>) -> Result<Self, TrainError> {
        self.updates.shards = shards;
        self.updates.check_states()?;
        Ok(self)
    }

    /// Division of the optimizer's state, if it is divided.
    pub fn shards(&self) -> Option<&Shards> {
        self.updates.shards.as_ref()
    }

    /// Enters a stage with its objective, its hooks in addition to those of the whole run, and its schedule. The first
    /// step of the stage is the one after `before` steps, its first sample the one after `before` samples.
    pub fn enter_stage(
        &mut self,
        objective: Objective<M>,
        hooks: Hooks<M>,
        schedule: Schedule,
        before: [u64; 2],
    ) -> Result<(), TrainError> {
        self.objective = objective;
        self.updates.hooks.truncate(self.lasting_hooks);
        self.updates.hooks.append(hooks);
        self.options.schedule = schedule;
        self.before_stage = before;
        self.updates.check_states()
    }

    /// Learning-rate schedule of the stage.
    pub fn schedule(&self) -> &Schedule {
        &self.options.schedule
    }

    /// Mutable access to [`Trainer::schedule`].
    pub fn schedule_mut(&mut self) -> &mut Schedule {
        &mut self.options.schedule
    }

    /// Hooks with their states.
    pub fn hooks(&self) -> &Hooks<M> {
        &self.updates.hooks
    }

    /// Mutable access to [`Trainer::hooks`].
    pub fn hooks_mut(&mut self) -> &mut Hooks<M> {
        &mut self.updates.hooks
    }

    /// Plain device (without autodiff) of the model.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Optimizer with its state.
    pub fn optimizer(&self) -> &ModuleOptimizer {
        &self.updates.optimizer
    }

    /// Mutable access to [`Trainer::optimizer`].
    pub fn optimizer_mut(&mut self) -> &mut ModuleOptimizer {
        &mut self.updates.optimizer
    }
}
