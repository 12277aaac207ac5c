//! Trajectories of projected optimizers: weights, moments, subspace and limiter after every step.

use std::sync::Mutex;

use burn::optim::Optimizer;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowrank_optim::{
    ByMatrix, ByMatrixState, Projected, ProjectedConfig, ProjectedState, Projector, ProjectorKind, Renewal, Residual,
    Side, Subspace,
};

use super::case::{Array, Case, Outcome, host};

/// Greatest difference allowed: absolute and relative.
#[derive(Clone, Copy)]
pub struct Tolerance(pub f64, pub f64);

pub const SIDES: &[(&str, Side)] = &[
    ("std", Side::Std),
    ("reverse_std", Side::ReverseStd),
    ("left", Side::Left),
    ("right", Side::Right),
    ("full", Side::Full),
];

pub const PROJECTORS: &[(&str, ProjectorKind)] = &[
    ("svd", ProjectorKind::Svd),
    ("dct", ProjectorKind::Dct),
    ("columns", ProjectorKind::Columns),
    ("rows", ProjectorKind::Rows),
    ("randk", ProjectorKind::Randk),
    ("random", ProjectorKind::Random),
    ("randperm", ProjectorKind::Randperm),
    ("block", ProjectorKind::Block),
];

pub fn adam(case: &Case, config: ProjectedConfig) -> Result<ProjectedConfig, String> {
    Ok(config
        .with_density(0.0)
        .with_beta_1(case.number("beta1")?)
        .with_beta_2(case.number("beta2")?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay")?))
}

/// Gives the subspaces of a case in place of random ones.
#[derive(Debug)]
pub struct Given {
    pub subspaces: Mutex<Vec<Subspace>>,
}

impl Projector for Given {
    fn choose(&self, _: &Renewal) -> Subspace {
        self.subspaces.lock().expect("one thread").remove(0)
    }
}

pub fn given(config: &ProjectedConfig, case: &Case) -> Result<ByMatrix<Projected>, String> {
    let mut subspaces = Vec::new();
    if case.has("selected") {
        let selected = case.array("selected")?;
        for renewal in 0..selected.shape[0] {
            let chosen = selected.at(renewal).i32();
            let data = TensorData::new(chosen, [selected.shape[1]]);
            let indices = Tensor::<1, Int>::from_data(data, (&Device::default(), DType::I32));
            subspaces.push(match config.projector {
                ProjectorKind::Randk => Subspace::Entries(indices),
                _ => Subspace::Coordinates(indices),
            });
        }
    } else {
        let projections = case.array("proj")?;
        for step in (0..projections.shape[0]).step_by(config.update_proj_gap) {
            subspaces.push(Subspace::Dense(projections.at(step).tensor()));
        }
    }
    config.build_with(Given { subspaces: Mutex::new(subspaces) }).map_err(|error| error.to_string())
}

/// Runs a case, comparing weights and every part of the state that the case has.
pub fn trajectory(
    case: &Case,
    config: &ProjectedConfig,
    optimizer: ByMatrix<Projected>,
    tolerance: Tolerance,
) -> Outcome {
    let (grads, rates, weights) = (case.array("grads")?, case.array("lr")?, case.array("w")?);
    let w0 = case.array("w0")?;
    let shape = [w0.shape[0], w0.shape[1]];
    let mut w = w0.tensor::<2>();
    let mut state: Option<ByMatrixState<2, ProjectedState>> = None;
    let mut worst = 0f64;
    for step in 0..grads.shape[0] {
        (w, state) = optimizer.step(rates.values[step], w, grads.at(step).tensor(), state);
        let name = |part: &str| format!("{part} at step {}", step + 1);
        let near = weights.at(step).near(&name("w"), &host(w.clone()), tolerance.0, tolerance.1)?;
        worst = worst.max(near);
        let state = state.as_ref().and_then(|state| state.matrix.as_ref()).ok_or("the matrix was not projected")?;
        compare(case, config, state, shape, step, tolerance)?;
    }
    Ok(format!("weights within {worst:.1e}"))
}

pub fn compare(
    case: &Case,
    config: &ProjectedConfig,
    state: &ProjectedState,
    shape: [usize; 2],
    step: usize,
    tolerance: Tolerance,
) -> Result<(), String> {
    let name = |part: &str| format!("{part} at step {}", step + 1);
    let scaled = |array: &Array| tolerance.0.max(2e-5 * array.largest());
    let check = |part: &str, ours: Vec<f32>| -> Result<(), String> {
        let expected = case.array(part)?.at(step);
        expected.near(&name(part), &ours, scaled(&expected), tolerance.1).map(|_| ())
    };
    for (part, moment) in [("m", &state.moment_1), ("v", &state.moment_2)] {
        if case.has(part) {
            check(part, host(moment.clone().ok_or(format!("{part} is missing"))?.restored()))?;
        }
    }
    let subspace = state.subspace.as_ref().ok_or("no subspace is kept")?;
    if case.has("indices") {
        let ours = subspace.indices().ok_or("no indices are kept")?;
        let expected = case.array("indices")?.at(step).i32();
        if ours != expected {
            return Err(format!("{} are {ours:?} instead of {expected:?}", name("indices")));
        }
    }
    let side = if config.right(shape) { shape[1] } else { shape[0] };
    if let Subspace::TwoSided(left, right) = subspace {
        check("proj_left", host(left.clone()))?;
        check("proj_right", host(right.clone()))?;
    } else if let Some(columns) = subspace.columns(side, &Device::default()) {
        for part in ["proj", "proj_left", "proj_right"] {
            if case.has(part) {
                let expected = case.array(part)?.at(step);
                expected.near(&name(part), &host(columns.clone()), 2e-5, 0.0)?;
            }
        }
    }
    // Without a limit no norm is remembered.
    if case.has("limiter_norm") && config.growth_limit > 0.0 {
        check("limiter_norm", vec![state.limiter_norm.ok_or("no norm is kept")? as f32])?;
    }
    if let Some(error) = &state.error {
        check("error", host(error.restored().ok_or("an error buffer without content")?))?;
    } else if case.has("error") && config.residual != Residual::None {
        return Err("no error buffer is kept".into());
    }
    if case.has("error_codes") {
        let rows = state.error.as_ref().and_then(|error| error.quantised()).ok_or("no codes are kept")?;
        let ours: Vec<i32> = rows.iter().flat_map(|row| row.codes.iter().map(|code| i32::from(*code))).collect();
        if ours != case.array("error_codes")?.at(step).i32() {
            return Err(format!("{} differ", name("error_codes")));
        }
        let (lows, highs): (Vec<f32>, Vec<f32>) = rows.iter().map(|row| (row.low, row.high)).unzip();
        case.array("error_min")?.at(step).near(&name("error_min"), &lows, 2e-5, 1e-5)?;
        case.array("error_max")?.at(step).near(&name("error_max"), &highs, 2e-5, 1e-5)?;
    }
    Ok(())
}
