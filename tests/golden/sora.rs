//! SoRA against reference values.

use burn::tensor::Tensor;
use lowrank_models::adapter::{
    AdapterConfig, Gated, GivenTensors, Prox, SoRa, SparsifyingSchedule, Structure, ThresholdMode, official_prox,
    soft_prox, thresholds,
};

use super::support::allocated::{Training, constant, data, vector};
use super::support::bench::near;
use super::support::case::{Case, Outcome, host};

const SCHEDULES: [(&str, SparsifyingSchedule); 3] = [
    ("linear", SparsifyingSchedule::Linear),
    ("log_linear", SparsifyingSchedule::LogLinear),
    ("exp_linear", SparsifyingSchedule::ExpLinear),
];

pub fn run(case: &Case) -> Outcome {
    let mut done = Vec::new();
    if case.has("input") {
        done.push(prox(case)?);
    }
    if case.names().iter().any(|name| SCHEDULES.iter().any(|(kind, _)| name.starts_with(&format!("{kind}_")))) {
        done.push(schedules(case)?);
    }
    if case.has("m0.gate.0") {
        done.push(training(case)?);
    }
    match done.is_empty() {
        true => Err("is of no known kind".into()),
        false => Ok(done.join("; ")),
    }
}

fn prox(case: &Case) -> Outcome {
    let tau = match case.config["tau"].as_f64() {
        Some(tau) => tau,
        None => case.array("tau")?.values[0],
    };
    let gates = || -> Result<Tensor<1>, String> {
        let data = vector(case, "input")?;
        Ok(Tensor::from_data(data, &Default::default()))
    };
    near(case, "official", &host(official_prox(gates()?, tau)), 1e-6)?;
    near(case, "soft", &host(soft_prox(gates()?, tau)), 1e-6)?;
    Ok("both proximal steps are equal".into())
}

fn schedules(case: &Case) -> Outcome {
    let mut count = 0;
    for name in case.names() {
        let (kind, which) = name.rsplit_once('_').ok_or_else(|| format!("tensor {name} is of no known kind"))?;
        let kind = SCHEDULES.iter().find(|(known, _)| *known == kind).map(|(_, kind)| *kind);
        let kind = kind.ok_or_else(|| format!("tensor {name} is of no known schedule"))?;
        let set = &case.config[which];
        let number = |key: &str| set[key].as_f64().ok_or_else(|| format!("configuration: {which}.{key}"));
        let stages = thresholds(kind, number("start")?, number("max")?, number("n")? as usize);
        let stages: Vec<f32> = stages.into_iter().map(|value| value as f32).collect();
        near(case, &name, &stages, 1e-5)?;
        count += 1;
    }
    Ok(format!("{count} schedules are equal"))
}

fn training(case: &Case) -> Outcome {
    let (rank, steps, lr) = (case.count("r")?, case.count("steps")?, case.number("lr")?);
    let lr_gate = case.config["lr_gate"].as_f64().unwrap_or(lr);
    if case.config["weight_decay_gate"].as_f64().unwrap_or(0.0) != 0.0 {
        return Err("configuration: weight_decay_gate is not 0".into());
    }
    let allocation = SoRa {
        lambda: case.number("l1_lambda")?,
        threshold: case.number("xi")?,
        threshold_mode: case.choice(
            "threshold_mode",
            &[("absolute", ThresholdMode::Absolute), ("lr_scaled", ThresholdMode::LrScaled)],
        )?,
        prox: case.choice("prox", &[("official", Prox::Official), ("soft", Prox::Soft)])?,
        ..SoRa::default()
    };
    let adapter = AdapterConfig::new("gated")
        .with_rank(rank)
        .with_alpha(case.number("alpha")?)
        .with_option("gate_lr_scale", lr_gate / lr);
    let tensors = |layer: &str| -> Result<GivenTensors, String> {
        Ok(GivenTensors::from([
            ("a".to_string(), data(case, &format!("{layer}.A.0"))?),
            ("gate".into(), vector(case, &format!("{layer}.gate.0"))?),
            ("b".into(), data(case, &format!("{layer}.B.0"))?),
        ]))
    };
    let run = constant(steps as u64, lr);
    let mut training = Training::new(case, adapter, &tensors, &allocation, &run, case.number("weight_decay_AB")?)?;
    let clip = case.config["max_grad_norm"].as_f64();
    for t in 0..steps {
        let before: Vec<_> = (0..training.count()).map(|number| training.layer(number)).collect();
        let mut step = training.step(case, t as u64, lr, 1, clip)?;
        for (name, loss) in [("task_loss", step.task_loss), ("total_loss", step.total_loss)] {
            near(case, &format!("{name}.{t}"), &[loss], 1e-5)?;
        }
        if case.has(&format!("grad_norm.{t}")) {
            near(case, &format!("grad_norm.{t}"), &[step.grad_norm as f32], 1e-5)?;
        }
        for (number, before) in before.iter().enumerate() {
            let name = |what: &str| format!("m{number}.{what}.{t}");
            let gated = gated(before)?;
            near(case, &name("y"), &host(step.outputs[number].clone()), 1e-5)?;
            for (what, id) in [("grad_A", gated.a.id), ("grad_B", gated.b.id)] {
                let grad = step.grads.remove::<2>(id).ok_or_else(|| format!("{what} is missing"))?;
                near(case, &name(what), &host(grad.transpose()), 1e-5)?;
            }
            let grad = step.grads.remove::<1>(gated.gate.id).ok_or("the gate has no gradient")?;
            near(case, &name("grad_gate"), &host(grad), 1e-5)?;
        }
        for number in 0..training.count() {
            let layer = training.layer(number);
            let (gated, next) = (gated(&layer)?, t + 1);
            let name = |what: &str| format!("m{number}.{what}.{next}");
            near(case, &name("A"), &host(gated.a.val().inner().transpose()), 1e-5)?;
            near(case, &name("B"), &host(gated.b.val().inner().transpose()), 1e-5)?;
            let gates = host(gated.gate.val().inner());
            near(case, &name("gate"), &gates, 1e-5)?;
            // Exactly zero, and nothing else.
            let zeros = |values: &[f32]| values.iter().map(|value| *value == 0.0).collect::<Vec<_>>();
            if zeros(&gates) != zeros(&case.array(&name("gate"))?.f32()) {
                return Err(format!("{} is zero at other components", name("gate")));
            }
        }
    }
    for number in 0..training.count() {
        let layer = training.layer(number);
        let gated = gated(&layer)?;
        let active = gated.active_components().ok_or("gates have active components")?;
        let keep: Vec<f32> = (0..rank).map(|component| f32::from(u8::from(active.contains(&component)))).collect();
        near(case, &format!("m{number}.keep"), &keep, 0.0)?;
        let [a, b] = gated.as_factors().ok_or("a product has factors")?;
        if case.has(&format!("m{number}.pruned_A")) {
            near(case, &format!("m{number}.pruned_A"), &host(a.inner().transpose()), 1e-5)?;
            let scale = layer.place().scale;
            near(case, &format!("m{number}.pruned_B"), &host(b.inner().transpose().div_scalar(scale)), 1e-5)?;
        } else if a.dims()[1] != 0 {
            return Err(format!("m{number} keeps {} components instead of none", a.dims()[1]));
        }
        near(case, &format!("m{number}.merged_W"), &training.merged(number), 1e-5)?;
    }
    Ok(format!("{steps} steps, kept components and merged weights are equal"))
}

fn gated(adapter: &lowrank_models::adapter::Adapter) -> Result<&Gated, String> {
    adapter.structure.downcast_ref::<Gated>().ok_or_else(|| "the adapter has gates".into())
}
