//! Optimizer of a run, and the hooks of its rule and parameterization.

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use lowrank_models::adapter::{MatrixPenalty, PenaltyHook, Rule};
use lowrank_models::linear::OptimizerRequest;
use lowrank_optim::registry::{self, Options};
use lowrank_optim::{AssignedTo, Assignment, Hooks, OptimError, StateMeter, WeightStorage};

use super::{Architecture, BuildError};
use crate::config::{Config, NONE};

/// Optimizer with its hooks.
pub struct Optimizer<M: Module> {
    /// The optimizer itself.
    pub optimizer: ModuleOptimizer,
    /// Hooks of rule and parameterization around its steps.
    pub hooks: Hooks<M>,
    /// Assignment of each parameter to an optimizer.
    pub parameters: Vec<Assignment>,
}

/// Options of the optimizer in the configuration.
pub fn optimizer_options(config: &Config) -> Options {
    let mut options = config.optimizer.options.clone();
    options.insert("weight_decay".into(), config.optimizer.weight_decay.into());
    options
}

/// Sets the rank of an optimizer that needs one and has none to a quarter of the model's width, and returns it.
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

/// Bytes of optimizer state of each parameter with its assignment, and of the corrections of trained matrices in this
/// storage.
pub fn parameter_states(
    config: &Config,
    rule: &dyn Rule,
    parameters: &[Assignment],
    storage: WeightStorage,
) -> Result<Vec<u64>, BuildError> {
    let method = registry::optimizer(&config.optimizer.name)?;
    let options = rule.options(method.name, optimizer_options(config))?;
    let active = method.active_share(&options)?;
    let state = |assignment: &Assignment| {
        let shape = assignment.parameter.shape.as_slice();
        let values: usize = shape.iter().product();
        let sides = match *shape {
            [rows, columns] => [rows, columns],
            _ => [values, 1],
        };
        let state = match assignment.optimizer {
            AssignedTo::Method(_) => (active * method.state_bytes(&options, sides)? as f64) as usize,
            AssignedTo::Table(_, table) => method.table_bytes(&options, table, sides)?.unwrap_or(8 * values),
            AssignedTo::Descent => 0,
            AssignedTo::TooSmall(_) | AssignedTo::AdamW => 8 * values,
        };
        let corrections = if shape.len() == 2 { storage.correction_bytes(values) } else { 0 };
        Ok((state + corrections) as u64)
    };
    parameters.iter().map(state).collect()
}

/// Returns the optimizer of the configuration for the trained parameters of this model.
pub fn optimizer<M: Architecture>(
    config: &Config,
    rule: &dyn Rule,
    model: &M,
    meter: &StateMeter,
) -> Result<Optimizer<M>, BuildError> {
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
    hidden = hidden.stored(config.weights.storage, config.train.seed);
    let steps = model.linear_steps(config.train.seed);
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
        OptimError::Option(error) => BuildError::from(OptimError::Option(error.under("optimizer"))),
        OptimError::NothingFits { largest: [rows, columns] } => {
            let stated = || method.options().get("rank").and_then(|option| option.default.clone());
            let rank = options.get("rank").cloned().or_else(stated).unwrap_or_default();
            BuildError::Settings(format!(
                "optimizer.options.rank = {rank}: larger than the projected side of every hidden matrix, of which {rows} x {columns} is the largest; set it to at most {}",
                rows.min(columns)
            ))
        }
        other => other.into(),
    })?;
    let mut hooks = Hooks::new();
    if let Some(rule) = rule.gradients(model, &options, meter)? {
        hooks = hooks.with(rule);
    }
    if let Some(steps) = steps {
        hooks = M::with_steps(hooks, steps);
    }
    if config.penalty.name != NONE {
        let penalty = <dyn MatrixPenalty>::named(&config.penalty.name, &config.penalty.options)?;
        hooks = hooks.with(PenaltyHook::new(penalty, &config.penalty.matrices, model)?);
    }
    Ok(Optimizer { optimizer, hooks, parameters })
}
