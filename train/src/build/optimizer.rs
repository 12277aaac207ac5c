//! The optimizer of a run, and what its parameterization does around updates.

use burn::optim::ModuleOptimizer;
use lowrank_models::adapter::Rule;
use lowrank_models::linear::{OptimizerRequest, RunFacts};
use lowrank_models::{Llama, LlamaSteps};
use lowrank_optim::registry::{self, Options};
use lowrank_optim::{Assignment, Hooks, OptimError, StateMeter};

use super::BuildError;
use crate::config::Config;

/// What turns gradients into updates.
pub struct Optimizer {
    /// The optimizer itself.
    pub optimizer: ModuleOptimizer,
    /// What rule and parameterization do around its steps.
    pub hooks: Hooks<Llama>,
    /// Who steps each parameter.
    pub parameters: Vec<Assignment>,
}

/// Options of the optimizer that the configuration gives.
pub fn optimizer_options(config: &Config) -> Options {
    let mut options = config.optimizer.options.clone();
    options.insert("weight_decay".into(), config.optimizer.weight_decay.into());
    options
}

/// Gives an optimizer that needs a rank, where none is given, a quarter of the model's width, and returns it.
pub fn usual_rank(config: &mut Config, hidden_size: usize) -> Option<usize> {
    let options = registry::optimizer(&config.optimizer.name).ok()?.options();
    let needed = options.get("rank").is_some_and(|rank| rank.default.is_none());
    if !needed || config.optimizer.options.contains_key("rank") {
        return None;
    }
    let rank = (hidden_size / 4).max(1);
    config.optimizer.options.insert("rank".into(), rank.into());
    Some(rank)
}

/// The optimizer of the configuration for what of this model is trained.
pub fn optimizer(config: &Config, rule: &dyn Rule, model: &Llama, meter: &StateMeter) -> Result<Optimizer, BuildError> {
    let section = &config.optimizer;
    let method = registry::optimizer(&section.name)?;
    let options = optimizer_options(config);
    let options = rule.options(method.name, options)?;
    let mut hidden = rule.parameters(model);
    if !section.include.is_empty() {
        hidden = hidden.including(&section.include)?;
    }
    if !section.exclude.is_empty() {
        hidden = hidden.excluding(&section.exclude)?;
    }
    let run = RunFacts { seed: config.train.seed, width: model.config().hidden_size };
    let steps = model.config().parameterization.method().steps(run);
    let (optimizer, parameters) = match &steps {
        Some(steps) => steps.optimizer(&OptimizerRequest {
            method,
            options: &options,
            include: &section.include,
            exclude: &section.exclude,
            parameters: &hidden,
            meter,
        }),
        None => method.init(&options, &hidden, meter),
    }
    .map_err(|error| match error {
        OptimError::Option(error) => OptimError::Option(error.under("optimizer")),
        other => other,
    })?;
    let mut hooks = Hooks::new();
    if let Some(rule) = rule.gradients(model, &options, meter)? {
        hooks = hooks.with(rule);
    }
    if let Some(steps) = steps {
        hooks = hooks.with(LlamaSteps(steps));
    }
    Ok(Optimizer { optimizer, hooks, parameters })
}
