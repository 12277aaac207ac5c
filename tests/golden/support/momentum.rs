//! Steps of matrix optimizers with momentum.

use burn::tensor::{Device, Tensor};
use lowrank_optim::{Coefficients, MatrixId, MatrixRule, Scaling};

use super::case::{Array, Case, Outcome, host};

pub const COEFFICIENTS: &[(&str, Coefficients)] =
    &[("jordan", Coefficients::Jordan), ("varying", Coefficients::Varying)];

pub const SCALINGS: &[(&str, Scaling)] = &[
    ("kj", Scaling::Kj),
    ("spectral", Scaling::Spectral),
    ("dion", Scaling::Spectral),
    ("rms", Scaling::Rms),
    ("kimi", Scaling::Rms),
    ("none", Scaling::None),
];

pub const PLACE: MatrixId = MatrixId { key: 0, number: 0, count: 1 };

pub fn near_largest(expected: &Array, what: &str, ours: Vec<f32>) -> Result<(), String> {
    expected.near(what, &ours, 1e-5 * expected.largest(), 0.0).map(|_| ())
}

pub fn steps<R: MatrixRule>(
    case: &Case,
    rule: &R,
    compare: impl Fn(&R::State, usize) -> Result<(), String>,
) -> Outcome {
    let (grads, rates, weights, w0) = (case.array("grads")?, case.array("lr")?, case.array("w")?, case.array("w0")?);
    let mut w: Tensor<2> = w0.tensor();
    let mut state = rule.fresh([w0.shape[0], w0.shape[1]], PLACE, &Device::default());
    let mut worst = 0f64;
    for step in 0..grads.shape[0] {
        (w, state) = rule.step(rates.values[step], w, grads.at(step).tensor(), state);
        compare(&state, step).map_err(|error| format!("{error} at step {}", step + 1))?;
        let near = weights.at(step).near(&format!("w at step {}", step + 1), &host(w.clone()), 5e-6, 1e-6)?;
        worst = worst.max(near);
    }
    Ok(format!("weights within {worst:.1e}"))
}
