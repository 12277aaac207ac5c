//! DCT-AdamW against the authors' code: transforms, and trajectories with every part of the state.

use burn::optim::Optimizer;
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_optim::{Basis, Dct, DctAdamW, DctAdamWConfig, DctAdamWState, Norm, ProjectedState, Side};

use super::case::{Array, Case, Outcome};

/// A case holds a transform or a trajectory.
pub fn run(case: &Case) -> Outcome {
    match (case.has("dct2_matrix"), case.has("grads")) {
        (true, false) => transform(case),
        (false, true) => trajectory(case),
        _ => Err("holds neither a transform nor a trajectory".into()),
    }
}

fn transform(case: &Case) -> Outcome {
    let n = case.count("n")?;
    let dct = Dct::of(n);
    case.array("dct2_matrix")?.near("dct2_matrix", dct.matrix(), 2e-6, 0.0)?;
    let x = case.array("x")?;
    let mut worst = 0f64;
    for (name, basis) in [("dct2_of_rows", Basis::Dct2), ("dct3_of_rows", Basis::Dct3)] {
        let mut rows = x.f32();
        dct.transform_rows(&mut rows, basis);
        worst = worst.max(case.array(name)?.near(name, &rows, 2e-6, 1e-6)?);
    }
    Ok(format!("n = {n}, within {worst:.1e}"))
}

/// The values of one step.
fn at(array: &Array, step: usize) -> Array {
    let size: usize = array.shape[1..].iter().product();
    Array { shape: array.shape[1..].to_vec(), values: array.values[step * size..(step + 1) * size].to_vec() }
}

fn tensor<const D: usize>(array: &Array) -> Tensor<D> {
    Tensor::from_data(TensorData::new(array.f32(), array.shape.clone()), &Device::default())
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("f32")
}

fn word<'a>(case: &'a Case, key: &str) -> Result<&'a str, String> {
    case.config[key].as_str().ok_or_else(|| format!("configuration: {key} is {}", case.config[key]))
}

fn config(case: &Case) -> Result<DctAdamWConfig, String> {
    let unknown = |key: &str, value: &str| Err(format!("configuration: {key} is \"{value}\""));
    let side = match word(case, "side")? {
        "std" => Side::Std,
        "left" => Side::Left,
        "right" => Side::Right,
        other => return unknown("side", other),
    };
    let levels = match word(case, "error_feedback")? {
        "none" | "full" => 0,
        "quantized" => case.count("error_levels")? as u8,
        other => return unknown("error_feedback", other),
    };
    Ok(DctAdamWConfig::new(case.count("rank")?)
        .with_side(side)
        .with_dct2(match word(case, "basis")? {
            "dct3" => false,
            "dct2" => true,
            other => return unknown("basis", other),
        })
        .with_norm(match word(case, "norm")? {
            "l1" => Norm::L1,
            "l2" => Norm::L2,
            other => return unknown("norm", other),
        })
        .with_update_proj_gap(case.count("update_proj_gap")?)
        .with_rotate(case.config["rotate_subspace"].as_bool().ok_or("configuration: rotate_subspace is no flag")?)
        .with_error_feedback(word(case, "error_feedback")? != "none")
        .with_error_levels(levels)
        .with_beta_1(case.number("beta1")?)
        .with_beta_2(case.number("beta2")?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay")?))
}

fn trajectory(case: &Case) -> Outcome {
    let config = config(case)?;
    let mut worst = 0f64;
    for fft in [false, true] {
        worst = worst.max(steps(case, config.clone().with_fft(fft).build())?);
    }
    if case.has("b0") {
        vector(case, config.build())?;
    }
    Ok(format!("weights within {worst:.1e} by product and by fast transform"))
}

fn steps(case: &Case, optimizer: DctAdamW) -> Result<f64, String> {
    let (grads, rates, weights) = (case.array("grads")?, case.array("lr")?, case.array("w")?);
    let mut w = tensor::<2>(&case.array("w0")?);
    let mut state: Option<DctAdamWState<2>> = None;
    let mut worst = 0f64;
    for step in 0..grads.shape[0] {
        (w, state) = optimizer.step(rates.values[step], w, tensor(&at(&grads, step)), state);
        let projected =
            state.as_ref().and_then(|state| state.projected.as_ref()).ok_or("the matrix was not projected")?;
        compare(case, step, projected)?;
        worst = worst.max(at(&weights, step).near(&format!("w at step {}", step + 1), &host(w.clone()), 2e-5, 1e-5)?);
    }
    Ok(worst)
}

fn compare(case: &Case, step: usize, state: &ProjectedState) -> Result<(), String> {
    let name = |part: &str| format!("{part} at step {}", step + 1);
    let indices: Vec<i32> = state.indices.to_data().try_into_vec().expect("i32");
    let expected = at(&case.array("indices")?, step).i32();
    if indices != expected {
        return Err(format!("{} are {indices:?} instead of {expected:?}", name("indices")));
    }
    for (part, ours) in [("m", &state.moment_1), ("v", &state.moment_2)] {
        at(&case.array(part)?, step).near(&name(part), &host(ours.clone()), 2e-5, 1e-5)?;
    }
    let Some(error) = &state.error else {
        return if case.has("error") { Err("no error buffer is kept".into()) } else { Ok(()) };
    };
    let restored = host(error.restored().ok_or("an error buffer without content")?);
    at(&case.array("error")?, step).near(&name("error"), &restored, 2e-5, 1e-5)?;
    let Some(rows) = error.quantised() else { return Ok(()) };
    let codes: Vec<i32> = rows.iter().flat_map(|row| row.codes.iter().map(|code| i32::from(*code))).collect();
    if codes != at(&case.array("error_codes")?, step).i32() {
        return Err(format!("{} differ", name("error_codes")));
    }
    let lows: Vec<f32> = rows.iter().map(|row| row.low).collect();
    let highs: Vec<f32> = rows.iter().map(|row| row.high).collect();
    at(&case.array("error_min")?, step).near(&name("error_min"), &lows, 2e-5, 1e-5)?;
    at(&case.array("error_max")?, step).near(&name("error_max"), &highs, 2e-5, 1e-5)?;
    Ok(())
}

/// A parameter with one dimension takes plain AdamW.
fn vector(case: &Case, optimizer: DctAdamW) -> Result<(), String> {
    let (grads, rates, expected) = (case.array("b_grads")?, case.array("lr")?, case.array("b")?);
    let mut b = tensor::<1>(&case.array("b0")?);
    let mut state = None;
    for step in 0..grads.shape[0] {
        (b, state) = optimizer.step(rates.values[step], b, tensor(&at(&grads, step)), state);
        at(&expected, step).near(&format!("b at step {}", step + 1), &host(b.clone()), 2e-6, 1e-5)?;
    }
    Ok(())
}
