//! LoRA-Pro against reference values.

use std::collections::BTreeMap;

use lowrank_models::adapter::{AdapterConfig, LoraProRule, Rule};
use lowrank_optim::StateMeter;
use lowrank_optim::registry::Options;
use lowrank_optim::rules::{LoraProMode, LoraProX};

use super::support::bench::{adapter, near};
use super::support::case::{Array, Case, Outcome, host};
use super::support::rules::{Training, X_MODES, bench, gradients, moments, text};

pub fn run(case: &Case) -> Outcome {
    let rank = case.count("rank")?;
    let config = AdapterConfig::new("lora").with_rank(rank).with_alpha(case.number("scale")? * rank as f64);
    match (case.has("full_grad"), case.has("full_grads")) {
        (true, false) => closed_form(case, &config),
        (false, true) => lora_pro_training(case, &config),
        _ => Err("is of no known kind".into()),
    }
}

fn closed_form(case: &Case, config: &AdapterConfig) -> Outcome {
    let gradient = case.array("full_grad")?;
    let zeros = Array { shape: gradient.shape.clone(), values: vec![0.0; gradient.values.len()] };
    let bench = bench(case, zeros, config, ["A", "B"])?;
    let plain = gradients(&bench, &mut bench.pulled(gradient.tensor()))?;
    let mut adjusted = BTreeMap::new();
    for (name, x_mode) in X_MODES {
        let rule = LoraProRule { mode: LoraProMode::Sgd, x_mode, delta: case.number("delta")? };
        let rule = rule.gradients(&bench, &Options::new(), &StateMeter::new()).map_err(text)?;
        let rule = rule.ok_or("lora-pro has a gradient rule")?;
        let mut grads = rule.apply(&bench, bench.pulled(gradient.tensor())).map_err(text)?;
        adjusted.insert(name, gradients(&bench, &mut grads)?);
    }
    let a = case.array("A")?;
    for factor in ["A", "B"] {
        near(case, &format!("lora_grad_{factor}"), &plain[factor], 1e-5)?;
    }
    for (name, gradients) in &adjusted {
        for factor in ["A", "B"] {
            near(case, &format!("{name}_grad_{factor}"), &gradients[factor], 1e-5)?;
        }
        near(case, "equivalent_grad", &equivalent(case, gradients)?, 1e-5)?;
        // X enters the gradient of A as X A.
        let x = case.array(&format!("{name}_X"))?;
        let mut expected = Array { shape: a.shape.clone(), values: Vec::new() };
        let (rank, d_in) = (a.shape[0], a.shape[1]);
        for (row, column) in (0..rank).flat_map(|row| (0..d_in).map(move |column| (row, column))) {
            expected.values.push((0..rank).map(|k| x.values[row * rank + k] * a.values[k * d_in + column]).sum());
        }
        let ours: Vec<f32> =
            gradients["A"].iter().zip(&adjusted["zero"]["A"]).map(|(ours, zero)| ours - zero).collect();
        let largest = case.array(&format!("{name}_grad_A"))?.largest();
        expected.near(&format!("{name}_X A"), &ours, 1e-5 * largest, 0.0)?;
    }
    Ok("adjusted gradients are equal for every X".into())
}

/// `scale (B gA + gB A)` in f64, for factors `A` and `B` of the case.
fn equivalent(case: &Case, gradients: &BTreeMap<String, Vec<f32>>) -> Result<Vec<f32>, String> {
    equivalent_of(
        [case.array("A")?.f32(), case.array("B")?.f32()],
        gradients,
        case.count("rank")?,
        case.number("scale")?,
    )
}

fn equivalent_of(
    [a, b]: [Vec<f32>; 2],
    gradients: &BTreeMap<String, Vec<f32>>,
    rank: usize,
    scale: f64,
) -> Result<Vec<f32>, String> {
    let (d_in, d_out) = (a.len() / rank, b.len() / rank);
    let product = |left: &[f32], right: &[f32], row: usize, column: usize| -> f64 {
        (0..rank).map(|k| f64::from(left[row * rank + k]) * f64::from(right[k * d_in + column])).sum()
    };
    let places = (0..d_out).flat_map(|row| (0..d_in).map(move |column| (row, column)));
    Ok(places
        .map(|(row, column)| {
            let sum = product(&b, &gradients["A"], row, column) + product(&gradients["B"], &a, row, column);
            (scale * sum) as f32
        })
        .collect())
}

fn lora_pro_training(case: &Case, config: &AdapterConfig) -> Outcome {
    let modes = [("full", LoraProMode::Full), ("efficient", LoraProMode::Efficient), ("sgd", LoraProMode::Sgd)];
    let mode = case.choice("mode", &modes)?;
    let delta = case.number("delta")?;
    let rule = LoraProRule { mode, x_mode: case.choice("x_mode", &X_MODES)?, delta };
    let bare = LoraProRule { mode: LoraProMode::Sgd, x_mode: LoraProX::Zero, delta };
    let mut training = Training::new(case, bench(case, case.array("W_0")?, config, ["A_0", "B_0"])?, &rule)?;
    // From B = 0 the moments of the first steps are divisions of tiny numbers.
    let share = if mode == LoraProMode::Efficient && case.array("B_0")?.largest() == 0.0 { 1e-4 } else { 1e-5 };
    let full = case.array("full_grads")?;
    for step in 1..=full.shape[0] {
        let pulled = || training.bench.pulled(full.at(step - 1).tensor());
        let name = format!("equivalent_grad_{step}");
        if case.has(&name) {
            let none = (Options::new(), StateMeter::new());
            let bare = bare.gradients(&training.bench, &none.0, &none.1).map_err(text)?;
            let bare = bare.ok_or("lora-pro has a gradient rule")?;
            let gradients = gradients(&training.bench, &mut bare.apply(&training.bench, pulled()).map_err(text)?)?;
            let mut factors = BTreeMap::new();
            for (tensor, data) in adapter(&training.bench).tensors() {
                factors.insert(tensor.field.clone(), data.try_into_vec().map_err(|error| format!("{error:?}"))?);
            }
            let factors = ["a", "b"].map(|field| factors.remove(field).unwrap_or_default());
            let ours = equivalent_of(factors, &gradients, case.count("rank")?, case.number("scale")?)?;
            near(case, &name, &ours, share)?;
        }
        let grads = training.seen(pulled())?;
        training = training.step(grads);
        training.compare(case, step, share)?;
        near(case, &format!("W_effective_{step}"), &host(training.bench.weight().transpose()), share)?;
    }
    near(case, "W_final", &host(training.bench.base().transpose()), 1e-6)?;
    states(case, &training, share)?;
    Ok("factors, weights and moments are equal at every step".into())
}

/// The moments at the end: of the weight, or of the factors.
fn states(case: &Case, training: &Training, share: f64) -> Result<(), String> {
    let of_weight = case.has("state_m");
    let record = match (&training.rule, of_weight) {
        (Some(rule), true) => rule.to_record(),
        _ => training.optimizer.to_record(),
    };
    let moments = moments(record)?;
    let ids: Vec<(String, u64)> = match of_weight {
        true => vec![(String::new(), training.bench.base_id().val())],
        false => adapter(&training.bench).shapes().iter().map(|t| (t.field.to_uppercase(), t.id.val())).collect(),
    };
    for (factor, id) in ids {
        for (short, long) in [("m", "moment_1"), ("v", "moment_2")] {
            let name = format!("state_{short}{factor}");
            if case.has(&name) {
                let ours = moments.get(&format!("{id}.{long}")).ok_or(format!("{name} is not kept"))?;
                near(case, &name, ours, share)?;
            }
        }
    }
    Ok(())
}
