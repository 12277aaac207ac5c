//! Muon against reference values.

use lowrank_optim::{MomentumRule, MuonConfig, newton_schulz};

use super::support::case::{Case, Outcome, host};
use super::support::momentum::{COEFFICIENTS, SCALINGS, steps};

pub fn run(case: &Case) -> Outcome {
    let coefficients = case.choice("ns", COEFFICIENTS)?;
    if case.has("x") {
        let steps = case.array("coefficients")?.shape[0];
        let y = newton_schulz(case.array("x")?.tensor(), steps, coefficients, false);
        let worst = case.array("y")?.near("y", &host(y), 1e-5, 0.0)?;
        return Ok(format!("within {worst:.1e}"));
    }
    let rules = [("ema", MomentumRule::Ema), ("heavy_ball", MomentumRule::HeavyBall)];
    let config = MuonConfig::new()
        .with_momentum(case.number("mu")?)
        .with_momentum_rule(case.choice("momentum_rule", &rules)?)
        .with_nesterov(case.flag("nesterov")?)
        .with_ns_steps(case.count("ns_steps")?)
        .with_coefficients(coefficients)
        .with_scaling(case.choice("scaling", SCALINGS)?)
        .with_rows_are_outputs(true)
        .with_weight_decay(case.number("weight_decay")?);
    let rule = config.build().rule().clone();
    steps(case, &rule, |state, step| {
        let momentum = case.array("momentum")?.at(step);
        momentum.near("momentum", &host(state.momentum.clone()), 1e-6, 1e-5).map(|_| ())
    })
}
