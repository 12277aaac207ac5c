//! SCALE against reference values.

use burn::optim::Optimizer;
use burn::tensor::Tensor;
use lowrank_optim::{MatrixId, MatrixRule, Normalisation, ScaleConfig};

use super::support::case::{Array, Case, Outcome, host};

const PLACE: MatrixId = MatrixId { key: 0, number: 0, count: 1 };

pub fn run(case: &Case) -> Outcome {
    let normalisations = [("rms", Normalisation::Rms), ("l2", Normalisation::L2)];
    let config = ScaleConfig::new()
        .with_momentum(case.number("momentum")?)
        .with_normalisation(case.choice("normalisation", &normalisations)?)
        .with_floor(case.number("floor")?)
        .with_others_lr_scale(case.number("others_lr_scale")?)
        .with_beta_1(case.number("beta1")?)
        .with_beta_2(case.number("beta2")?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay")?);
    config.validate().map_err(|error| error.to_string())?;
    match case.word("role")? {
        "vector" => vector(case, &config),
        // Linear layers and the head lie transposed in the model, an embedding as in the case.
        "linear" => matrix(case, &config, false, true),
        "head" => matrix(case, &config, true, true),
        "embedding" => matrix(case, &config, false, false),
        "tied" => matrix(case, &config, true, false),
        other => Err(format!("configuration: role is \"{other}\"")),
    }
}

fn matrix(case: &Case, config: &ScaleConfig, has_momentum: bool, transposed: bool) -> Outcome {
    let stored = |array: &Array| {
        let tensor = array.tensor::<2>();
        if transposed { tensor.transpose() } else { tensor }
    };
    let (grads, rates, weights, w0) = (case.array("grads")?, case.array("lr")?, case.array("w")?, case.array("w0")?);
    let sizes = case.array("unit_scale")?;
    let optimizer = config.build(has_momentum);
    let rule = optimizer.rule();
    let mut w = stored(&w0);
    let [rows, columns] = w.dims();
    let mut state = rule.fresh([rows, columns], PLACE, &w.device());
    let mut worst = 0f64;
    for step in 0..grads.shape[0] {
        let grad = stored(&grads.at(step));
        (w, state) = rule.step(rates.values[step], w, grad.clone(), state);
        let name = |part: &str| format!("{part} at step {}", step + 1);
        let back = |tensor: Tensor<2>| host(if transposed { tensor.transpose() } else { tensor });
        worst = worst.max(weights.at(step).near(&name("w"), &back(w.clone()), 2e-6, 1e-6)?);
        let direction = state.momentum.clone().unwrap_or(grad);
        sizes.at(step).near(&name("unit_scale"), &host(rule.sizes(&direction)), 1e-9, 1e-5)?;
        if case.has("momentum") != has_momentum {
            return Err("a momentum belongs to the head alone".into());
        }
        if let Some(momentum) = &state.momentum {
            let expected = case.array("momentum")?.at(step);
            expected.near(&name("momentum"), &back(momentum.clone()), 1e-5 * expected.largest(), 0.0)?;
        }
    }
    Ok(format!("weights within {worst:.1e}"))
}

fn vector(case: &Case, config: &ScaleConfig) -> Outcome {
    let (grads, rates, weights) = (case.array("grads")?, case.array("lr")?, case.array("w")?);
    let optimizer = config.build(false);
    let mut w: Tensor<1> = case.array("w0")?.tensor();
    let (mut state, mut worst) = (None, 0f64);
    for step in 0..grads.shape[0] {
        (w, state) = optimizer.step(rates.values[step], w, grads.at(step).tensor(), state);
        let name = |part: &str| format!("{part} at step {}", step + 1);
        worst = worst.max(weights.at(step).near(&name("w"), &host(w.clone()), 2e-6, 1e-6)?);
        let plain = state.as_ref().and_then(|state| state.plain.as_ref()).ok_or("a vector has moments")?;
        for (part, ours) in [("m", &plain.moment_1), ("v", &plain.moment_2)] {
            let expected = case.array(part)?.at(step);
            expected.near(&name(part), &host(ours.clone()), 1e-5 * expected.largest(), 0.0)?;
        }
    }
    Ok(format!("weights within {worst:.1e}"))
}
