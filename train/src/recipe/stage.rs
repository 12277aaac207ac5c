//! Stages of a run.

use lowrank_models::Llama;
use lowrank_models::adapter::Allocation;
use lowrank_optim::Hooks;

use super::TrainedModel;
use crate::build::{Architecture, BuildError, Listener, check_text};
use crate::config::{Config, Job};
use crate::objective::{Objective, Stream};
use crate::plan::{Forecast, Freedom};

/// Stream with its name in the objective.
pub type NamedStream<B> = (String, Box<dyn Stream<B>>);

/// Part of a run: its data, objective, hooks and end.
pub struct Stage<M: Architecture = Llama> {
    /// Name in reports and checkpoints.
    pub name: String,
    /// Training and held-out rows. The training rows are the objective's main stream.
    pub data: M::Data,
    /// Further streams of the objective by name.
    pub streams: Vec<NamedStream<M::Batch>>,
    /// Objective that the stage minimises.
    pub objective: Objective<M>,
    /// Hooks in addition to those of the training rule and the parameterization.
    pub hooks: Hooks<M>,
    /// Steps of the stage; none if only a time limit ends it, which is allowed for the last one.
    pub steps: Option<u64>,
}

impl<M: Architecture> Stage<M> {
    /// Creates a stage with the model's own loss and no hooks.
    pub fn new(name: impl Into<String>, data: M::Data, steps: Option<u64>) -> Self {
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

impl<M: Architecture> Stage<M>
where
    M::Data: Clone,
{
    /// The stages of a run on the same data, as its allocation has them.
    pub(super) fn of_allocation(
        name: &str,
        data: M::Data,
        allocation: Option<&dyn Allocation>,
        steps: Option<u64>,
    ) -> Result<Vec<Self>, BuildError> {
        let steps = allocation.map_or(Ok(vec![steps]), |allocation| allocation.stages(steps))?;
        Ok(match steps.as_slice() {
            [steps] => vec![Self::new(name, data, *steps)],
            all => {
                let stage = |(number, steps): (usize, &Option<u64>)| {
                    Self::new(format!("{name}-{}", number + 1), data.clone(), *steps)
                };
                all.iter().enumerate().map(stage).collect()
            }
        })
    }
}

/// Number of the examples that a search searches with. Rejects one that leaves nothing on a side.
pub(super) fn searched(fraction: f64, examples: usize) -> Result<usize, BuildError> {
    let searched = (fraction * examples as f64).round() as usize;
    if searched == 0 || searched >= examples {
        return Err(BuildError::Settings(format!(
            "allocation.options.val_fraction = {fraction}: of {examples} examples it takes {searched} to search with; a search needs some of them, and others to learn from: change it, or give more examples"
        )));
    }
    Ok(searched)
}

/// Run of one model through stages that train it in order. Optimizer and moments continue from one stage to the next;
/// the learning-rate schedule restarts.
pub struct Recipe<M: Architecture = Llama> {
    /// Settings of model, optimizer, schedule and reports.
    pub config: Config,
    /// The model.
    pub model: TrainedModel<M>,
    /// The stages, at least one.
    pub stages: Vec<Stage<M>>,
    /// Expected memory, if the configuration limits it.
    pub forecast: Option<Forecast>,
}

impl Recipe {
    /// Creates the recipe of a configuration. If it limits memory, unset settings are changed so that the run fits.
    pub fn of(config: Config, freedom: Freedom, listener: &mut dyn Listener) -> Result<Self, BuildError> {
        check_text(&config)?;
        match config.run.job {
            Job::Pretrain => Self::pretrain(config, freedom, listener),
            Job::Finetune => Self::finetune(config, freedom, listener),
        }
    }
}
