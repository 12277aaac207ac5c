//! Settings that are allowed but probably unintended.

use lowrank_models::Parameterization;

use crate::config::Config;

/// Warnings about settings that are allowed but probably unintended.
/// `shapes` are those of the linear layers of a block.
pub fn warnings(
    config: &Config,
    parameterization: &Parameterization,
    shapes: &[[usize; 2]],
    total_steps: Option<u64>,
) -> Vec<String> {
    let mut warnings = Vec::new();
    let warmup = config.warmup_steps(total_steps);
    if let Some(steps) = total_steps.filter(|steps| 2 * warmup > *steps && *steps > 1) {
        warnings.push(format!(
            "the learning rate rises for {warmup} of the {steps} steps; shorten schedule.warmup_steps or lengthen the run"
        ));
    }
    let name = parameterization.name();
    let method = parameterization.method();
    let wide = |shape: &&[usize; 2]| {
        let held = method.values(**shape) + method.positions(**shape);
        !parameterization.is_dense() && held >= shape[0] * shape[1]
    };
    if let Some(shape @ [d_in, d_out]) = shapes.iter().find(wide) {
        warnings.push(format!(
            "{name} saves nothing: in place of the {} values of a {d_in} x {d_out} weight it trains {} and keeps {} positions; lower the rank or the density",
            d_in * d_out,
            method.values(*shape),
            method.positions(*shape)
        ));
    }
    let plan = method.restarts().filter(|plan| plan.needs_zero_rate);
    if let (Some(plan), Some(period), Some(steps)) = (plan, parameterization.spec().period, total_steps) {
        let period = format!("model.parameterization.options.{period} = {}", plan.every);
        if !steps.is_multiple_of(plan.every) {
            warnings.push(format!(
                "the {steps} steps of the run are no multiple of {period}: the last cycle has {} steps",
                steps % plan.every
            ));
        }
        if !config.schedule.adjust_steps.is_multiple_of(plan.every) {
            warnings.push(format!(
                "schedule.adjust_steps = {} is no multiple of {period}: the learning rate is not 0 where the factors restart",
                config.schedule.adjust_steps
            ));
        }
    }
    warnings
}
