//! AdaLoRA against reference values.

use burn::tensor::Tensor;
use lowrank_models::adapter::{AdaLora, Adapter, AdapterConfig, BudgetSchedule, GivenTensors, Structure, Triplet};

use super::support::allocated::{Training, constant, data, vector};
use super::support::bench::near;
use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    match (case.has("m0.A.0"), case.names().iter().any(|name| name.starts_with("budget_"))) {
        (true, _) => training(case),
        (false, true) => schedules(case),
        _ => Err("is of no known kind".into()),
    }
}

fn schedules(case: &Case) -> Outcome {
    let names: Vec<String> = case.names().into_iter().filter(|name| name.starts_with("budget_")).collect();
    for name in &names {
        let which = name.trim_start_matches("budget_");
        let set = case.config[which].as_array().ok_or_else(|| format!("configuration: {which}"))?;
        let number =
            |place: usize| set.get(place).and_then(serde_json::Value::as_u64).ok_or(format!("configuration: {which}"));
        let schedule = BudgetSchedule {
            initial: number(0)? as usize,
            target: number(1)? as usize,
            total_steps: number(2)?,
            t_init: number(3)?,
            t_final: number(4)?,
            delta_t: number(5)?,
        };
        compare(case, &schedule, name, &format!("mask_{which}"))?;
    }
    Ok(format!("{} schedules are equal", names.len()))
}

fn compare(case: &Case, schedule: &BudgetSchedule, budget: &str, mask: &str) -> Result<(), String> {
    let (budgets, masks): (Vec<f32>, Vec<f32>) = (0..schedule.total_steps)
        .map(|step| schedule.at(step))
        .map(|(budget, masked)| (budget as f32, f32::from(u8::from(masked))))
        .unzip();
    near(case, budget, &budgets, 0.0)?;
    near(case, mask, &masks, 0.0)
}

/// A, E, B as one block each, laid out as in cases.
pub fn whole(triplet: &Triplet) -> [Vec<f32>; 3] {
    let [a, b] = triplet.components();
    let e = Tensor::cat(triplet.e.iter().map(|block| block.val().inner()).collect::<Vec<_>>(), 0);
    [host(a.inner().transpose()), host(e), host(b.inner().transpose())]
}

pub fn triplet(adapter: &Adapter) -> Result<&Triplet, String> {
    adapter.structure.downcast_ref::<Triplet>().ok_or_else(|| "the adapter has triplets".into())
}

/// The tensors of a layer at the start.
pub fn tensors(case: &Case, layer: &str) -> Result<GivenTensors, String> {
    Ok(GivenTensors::from([
        ("a.0".to_string(), data(case, &format!("{layer}.A.0"))?),
        ("e.0".into(), vector(case, &format!("{layer}.E.0"))?),
        ("b.0".into(), data(case, &format!("{layer}.B.0"))?),
    ]))
}

/// The layers after the last step: `final_A`, `final_E`, `final_B`, absent where nothing is left, and merged weights.
pub fn finished(case: &Case, training: &Training, share: f64) -> Result<(), String> {
    for number in 0..training.count() {
        let layer = training.layer(number);
        let triplet = triplet(&layer)?;
        let active = triplet.active_components().ok_or("triplets have active components")?;
        let name = |what: &str| format!("m{number}.{what}");
        if !case.has(&name("final_A")) {
            if !active.is_empty() {
                return Err(format!("m{number} keeps {} components instead of none", active.len()));
            }
        } else {
            let rows = case.array(&name("final_E"))?.values.len();
            if active.len() != rows {
                return Err(format!("m{number} keeps {} components instead of {rows}", active.len()));
            }
            let [a, b] = triplet.components();
            let columns: Vec<_> = active.iter().map(|place| a.clone().inner().narrow(1, *place, 1)).collect();
            near(case, &name("final_A"), &host(Tensor::cat(columns, 1).transpose()), share)?;
            let rows: Vec<_> = active.iter().map(|place| b.clone().inner().narrow(0, *place, 1)).collect();
            near(case, &name("final_B"), &host(Tensor::cat(rows, 0).transpose()), share)?;
            let values = whole(triplet)[1].clone();
            let values: Vec<f32> = active.iter().map(|place| values[*place]).collect();
            near(case, &name("final_E"), &values, 10.0 * share)?;
        }
        near(case, &name("merged_W"), &training.merged(number), share)?;
        // What is exported is the same update.
        let [a, b] = triplet.as_factors().ok_or("a product has factors")?;
        if a.dims()[1] > 0 {
            let base = case.array(&name("W"))?.tensor::<2>();
            near(case, &name("merged_W"), &host(base + a.matmul(b).inner().transpose()), share)?;
        }
    }
    Ok(())
}

fn training(case: &Case) -> Outcome {
    let (rank, steps, lr) = (case.count("r_init")?, case.count("total_step")? as u64, case.number("lr")?);
    let allocation = AdaLora {
        target_rank: case.count("target_avg_rank")?,
        total_rank: None,
        t_init: case.count("t_init")? as u64,
        t_final: case.count("t_final")? as u64,
        delta_t: case.count("delta_t")? as u64,
        beta_1: case.number("beta1")?,
        beta_2: case.number("beta2")?,
        orth_weight: case.number("orth_weight")?,
    };
    let adapter = AdapterConfig::new("triplet").with_rank(rank).with_alpha(case.number("alpha")?);
    let run = constant(steps, lr);
    let decay = case.number("weight_decay")?;
    let given = |layer: &str| tensors(case, layer);
    let mut training = Training::new(case, adapter, &given, &allocation, &run, decay)?;
    let layers = training.count();
    let schedule = BudgetSchedule {
        initial: rank * layers,
        target: allocation.total_rank.unwrap_or(allocation.target_rank * layers),
        total_steps: steps,
        t_init: allocation.t_init,
        t_final: allocation.t_final,
        delta_t: allocation.delta_t,
    };
    compare(case, &schedule, "budget", "mask_applied")?;
    for t in 0..steps {
        let step = training.step(case, t, lr, 1, case.config["max_grad_norm"].as_f64())?;
        for (name, loss) in [("task_loss", step.task_loss), ("total_loss", step.total_loss)] {
            near(case, &format!("{name}.{t}"), &[loss], 1e-5)?;
        }
        if case.has(&format!("orth_regulariser.{t}")) && allocation.orth_weight > 0.0 {
            let regulariser = f64::from(step.total_loss - step.task_loss) / allocation.orth_weight;
            near(case, &format!("orth_regulariser.{t}"), &[regulariser as f32], 2e-5)?;
        }
        for number in 0..layers {
            let layer = training.layer(number);
            let [a, e, b] = whole(triplet(&layer)?);
            let name = |what: &str| format!("m{number}.{what}.{}", t + 1);
            near(case, &name("A"), &a, 1e-5)?;
            near(case, &name("E"), &e, 1e-5)?;
            near(case, &name("B"), &b, 1e-5)?;
            let mask = format!("m{number}.mask.{t}");
            if case.has(&mask) {
                let kept = case.array(&mask)?.values;
                if e.iter().zip(&kept).any(|(value, kept)| *kept == 0.0 && *value != 0.0) {
                    return Err(format!("{mask}: {e:?} is masked as {kept:?}"));
                }
            }
        }
    }
    finished(case, &training, 1e-5)?;
    Ok(format!("{steps} steps, masks and merged weights are equal"))
}
