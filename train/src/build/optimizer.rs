//! The optimizer of a run, and what its parameterization does around updates.

use burn::optim::ModuleOptimizer;
use lowrank_models::adapter::Rule;
use lowrank_models::{Llama, Parameterization};
use lowrank_optim::loro::{LoroConfig, LoroSteps};
use lowrank_optim::registry::{self, Options};
use lowrank_optim::{Hooks, MomentResets, StateMeter, Stepped};

use super::BuildError;
use crate::config::Config;
use crate::engine::Cycle;

/// What turns gradients into updates.
pub struct Optimizer {
    /// The optimizer itself.
    pub optimizer: ModuleOptimizer,
    /// What rule and parameterization do around its steps.
    pub hooks: Hooks<Llama>,
    /// Who steps each parameter.
    pub parameters: Vec<Stepped>,
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
pub fn optimizer(
    config: &Config,
    rule: &Rule,
    model: &Llama,
    cycle: &Cycle,
    meter: &StateMeter,
) -> Result<Optimizer, BuildError> {
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
    let (optimizer, parameters) = match cycle {
        Cycle::None => method.init(&options, &hidden, meter)?,
        Cycle::ReLora { resets, .. } => method.init_resettable(&options, &hidden, meter, resets)?,
        Cycle::Loro { steps, .. } => loro(config, &options, model)?.init(&hidden, meter, steps)?,
    };
    let mut hooks = Hooks::new();
    if let Some(rule) = rule.gradient_rule(model, &options, meter)? {
        hooks = hooks.with(rule);
    }
    Ok(Optimizer { optimizer, hooks: hooks.with(cycle.clone()), parameters })
}

/// The optimizer that belongs to LORO, with the options that are given.
fn loro(config: &Config, options: &Options, model: &Llama) -> Result<LoroConfig, BuildError> {
    let refuse = |key: &str, value: &str, reason: &str| {
        Err(BuildError::Settings(format!(
            "optimizer.{key} = {value} with model.parameterization.name = loro: {reason}"
        )))
    };
    let section = &config.optimizer;
    if section.name != "adamw" {
        return refuse("name", &section.name, "its exact steps are made of the moments of Adam; take adamw");
    }
    for (key, pattern) in [("include", &section.include), ("exclude", &section.exclude)] {
        if !pattern.is_empty() {
            return refuse(key, pattern, "both factors of every layer are stepped together; take it away");
        }
    }
    let Parameterization::Loro { rank, lr_scaler, .. } = model.config().parameterization else {
        unreachable!("the cycle was made of the parameterization");
    };
    let own_scale = rank as f64 / model.config().hidden_size as f64;
    let mut loro = LoroConfig::new(if lr_scaler == -1.0 { own_scale } else { lr_scaler });
    for (key, value) in options {
        let field = match key.as_str() {
            "beta_1" => &mut loro.adam.beta_1,
            "beta_2" => &mut loro.adam.beta_2,
            "epsilon" => &mut loro.adam.epsilon,
            "weight_decay" => &mut loro.adam.weight_decay,
            _ => return refuse(key, &value.to_string(), "it has beta_1, beta_2, epsilon and weight_decay"),
        };
        *field = match value {
            serde_json::Value::Number(number) => number.as_f64().unwrap_or_default(),
            _ => return refuse(key, &value.to_string(), "it must be a number"),
        };
    }
    Ok(loro)
}

/// What the parameterization does around updates.
pub fn cycle(config: &Config, parameterization: &Parameterization) -> Cycle {
    match parameterization {
        Parameterization::ReLora { reset_every, reset, .. } => Cycle::ReLora {
            every: *reset_every,
            keep: *reset,
            seed: config.train.seed,
            resets: MomentResets::default(),
        },
        Parameterization::Loro { exact_every, .. } => Cycle::Loro { every: *exact_every, steps: LoroSteps::default() },
        _ => Cycle::None,
    }
}
