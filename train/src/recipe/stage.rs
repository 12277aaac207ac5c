//! Stages of a run.

use lowrank_models::Llama;
use lowrank_optim::Hooks;

use super::{RunData, TrainedModel};
use crate::build::{BuildError, Listener};
use crate::config::{Config, Job};
use crate::objective::{Objective, TokenStream};
use crate::plan::{Forecast, Freedom};

/// A part of a run: what is learned from, by which objective and hooks, and when it ends.
pub struct Stage {
    /// Name in reports and checkpoints.
    pub name: String,
    /// Rows to learn from and to measure on. The rows to learn from are the objective's main stream.
    pub data: RunData,
    /// Further streams of the objective by name.
    pub streams: Vec<(String, TokenStream)>,
    /// The loss.
    pub objective: Objective<Llama>,
    /// Hooks in addition to those of the training rule and the parameterization.
    pub hooks: Hooks<Llama>,
    /// Steps of the stage; none where only the clock ends it, as it may the last one.
    pub steps: Option<u64>,
}

impl Stage {
    /// A stage with the model's own loss and no hooks.
    pub fn new(name: impl Into<String>, data: RunData, steps: Option<u64>) -> Self {
        Self {
            name: name.into(),
            data,
            streams: Vec::new(),
            objective: Objective::default(),
            hooks: Hooks::new(),
            steps,
        }
    }
}

/// A run: one model, and the stages that train it in order. Optimizer and moments go on from one stage to the next; the learning rate starts anew.
pub struct Recipe {
    /// Settings of model, optimizer, schedule and reports.
    pub config: Config,
    /// The model.
    pub model: TrainedModel,
    /// The stages, at least one.
    pub stages: Vec<Stage>,
    /// Expected memory, where the configuration limits it.
    pub forecast: Option<Forecast>,
}

impl Recipe {
    /// The recipe of a configuration. Where it limits memory, what is free is changed so that the run fits.
    pub fn of(config: Config, freedom: Freedom, listener: &mut dyn Listener) -> Result<Self, BuildError> {
        match config.run.job {
            Job::Pretrain => Self::pretrain(config, freedom, listener),
            Job::Finetune => Self::finetune(config, freedom, listener),
        }
    }
}
