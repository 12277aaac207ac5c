//! Settings that are allowed and probably not meant.

use lowrank_models::{LlamaConfig, Parameterization};

use crate::config::Config;

/// Warnings about settings that are allowed and probably not meant.
pub fn warnings(config: &Config, llama: &LlamaConfig, total_steps: Option<u64>) -> Vec<String> {
    let mut warnings = Vec::new();
    let warmup = config.warmup_steps(total_steps);
    if let Some(steps) = total_steps.filter(|steps| 2 * warmup > *steps && *steps > 1) {
        warnings.push(format!(
            "the learning rate rises for {warmup} of the {steps} steps; shorten schedule.warmup_steps or lengthen the run"
        ));
    }
    let parameterization = &llama.parameterization;
    let name = parameterization.name();
    let wide = |[d_in, d_out]: &[usize; 2]| {
        let held = parameterization.values(*d_in, *d_out) + parameterization.positions(*d_in, *d_out);
        *parameterization != Parameterization::Dense && held >= d_in * d_out
    };
    if let Some([d_in, d_out]) = llama.block_shapes().find(wide) {
        warnings.push(format!(
            "{name} saves nothing: in place of the {} values of a {d_in} x {d_out} weight it trains {} and keeps {} positions; lower the rank or the density",
            d_in * d_out,
            parameterization.values(d_in, d_out),
            parameterization.positions(d_in, d_out)
        ));
    }
    if let (Parameterization::ReLora { reset_every, .. }, Some(steps)) = (parameterization, total_steps) {
        if !steps.is_multiple_of(*reset_every) {
            warnings.push(format!(
                "the {steps} steps of the run are no multiple of model.parameterization.options.reset_every = {reset_every}: the last cycle has {} steps",
                steps % reset_every
            ));
        }
        if !config.schedule.adjust_steps.is_multiple_of(*reset_every) {
            warnings.push(format!(
                "schedule.adjust_steps = {} is no multiple of model.parameterization.options.reset_every = {reset_every}: the learning rate is not 0 where the factors restart",
                config.schedule.adjust_steps
            ));
        }
    }
    warnings
}
