//! Dion against reference values.

use burn::tensor::Device;
use lowrank_optim::{DionConfig, MatrixRule};

use super::support::case::{Case, Outcome, host};
use super::support::momentum::{PLACE, near_largest};

pub fn run(case: &Case) -> Outcome {
    let config = DionConfig::new()
        .with_rank(case.count("rank")?)
        .with_momentum(case.number("mu")?)
        .with_power_iters(case.count("power_iters")?)
        .with_norm_epsilon(case.number("eps")?)
        .with_rows_are_outputs(true)
        .with_weight_decay(case.number("weight_decay")?);
    let rule = config.build().rule().clone();
    let (grads, rates, w0) = (case.array("grads")?, case.array("lr")?, case.array("w0")?);
    let mut w = w0.tensor::<2>();
    let mut state = rule.fresh([w0.shape[0], w0.shape[1]], PLACE, &Device::default());
    state.q = case.array("q0")?.tensor();
    let mut worst = 0f64;
    for step in 0..grads.shape[0] {
        (w, state) = rule.step(rates.values[step], w, grads.at(step).tensor(), state);
        worst = worst.max(case.array("w")?.at(step).near(
            &format!("w at step {}", step + 1),
            &host(w.clone()),
            5e-6,
            0.0,
        )?);
        near_largest(&case.array("momentum")?.at(step), "momentum", host(state.momentum.clone()))?;
        case.array("q")?.at(step).near("q", &host(state.q.clone()), 2e-5, 0.0)?;
    }
    Ok(format!("weights within {worst:.1e}"))
}
