//! IncreLoRA against reference values.

use lowrank_models::adapter::{AdapterConfig, AllocationRun, IncreLora, Rates};

use super::adalora::{finished, tensors, triplet, whole};
use super::support::allocated::Training;
use super::support::bench::near;
use super::support::case::{Case, Outcome};

pub fn run(case: &Case) -> Outcome {
    let (rank, steps, lr) = (case.count("r_init")?, case.count("total_step")? as u64, case.number("lr")?);
    let advance_learn = case.config["advance_learn"].as_bool().unwrap_or(true);
    let allocation = IncreLora {
        total_rank: Some(case.count("target_total_rank")?),
        add_rank: case.count("add_rank")?,
        top_h: case.count("top_h")?,
        init_warmup: case.count("init_warmup")? as u64,
        increment_interval: case.count("increment_interval")? as u64,
        beta_1: case.number("beta1")?,
        beta_2: case.number("beta2")?,
        orth_weight: case.number("orth_weight")?,
        advance_learn,
        restart_warmup: case.config["restart_warmup"].as_bool().unwrap_or(true),
        ..IncreLora::default()
    };
    let reserve = case.number("reserve_E")?;
    if reserve != if advance_learn { 1e-5 } else { 0.0 } {
        return Err(format!("configuration: reserve_E is {reserve}"));
    }
    let micro = case.config["micro_batches"].as_u64().unwrap_or(1) as usize;
    // Linear warm-up, then linear to 0.
    let warmup = case.count("lr_warmup")? as u64;
    let factor = move |step: u64, total: u64| match step < warmup {
        true => step as f64 / warmup as f64,
        false => (total as f64 - step as f64).max(0.0) / (total as f64 - warmup as f64),
    };
    let run = AllocationRun {
        micro_batches: micro as u64,
        rates: Rates::new(move |step, total| lr * factor(step, total.unwrap_or(0))),
        ..AllocationRun::constant("default", Some(steps), lr)
    };
    let adapter = AdapterConfig::new("triplet").with_rank(rank).with_alpha(case.number("alpha")?);
    let decay = case.number("weight_decay")?;
    let given = |layer: &str| tensors(case, layer);
    let mut training = Training::new(case, adapter, &given, &allocation, &run, decay)?;
    let layers = training.count();
    let ranks = case.array("ranknum")?;
    for t in 0..steps {
        let step = training.step(case, t, lr * factor(t, steps), micro, case.config["max_grad_norm"].as_f64())?;
        for (name, loss) in [("task_loss", step.task_loss), ("total_loss", step.total_loss)] {
            near(case, &format!("{name}.{t}"), &[loss], 1e-5)?;
        }
        for (part, loss) in step.micro_losses.iter().enumerate().filter(|_| micro > 1) {
            near(case, &format!("micro_loss.{t}.{part}"), &[*loss], 1e-5)?;
        }
        draw_reserves(case, &mut training, t)?;
        for number in 0..layers {
            let layer = training.layer(number);
            let rank = layer.place().rank;
            if ranks.at(t as usize).values[number] != rank as f64 {
                return Err(format!("m{number} has rank {rank} after step {t}"));
            }
            let [a, e, b] = whole(triplet(&layer)?);
            let name = |what: &str| format!("m{number}.{what}.{}", t + 1);
            near(case, &name("A"), &a, 1e-5)?;
            near(case, &name("E"), &e, 1e-4)?;
            near(case, &name("B"), &b, 1e-5)?;
        }
    }
    finished(case, &training, 1e-5)?;
    Ok(format!("{steps} steps, ranks and merged weights are equal"))
}

/// Gives the reserves that were appended at a step the draws of the case, in place of ours.
fn draw_reserves(case: &Case, training: &mut Training, t: u64) -> Result<(), String> {
    for number in 0..training.count() {
        let name = |factor: &str| format!("m{number}.reserve_{factor}.{t}");
        if !case.has(&name("A")) {
            continue;
        }
        let layer = training.layer(number);
        let triplet = triplet(&layer)?;
        let (Some(a), Some(b)) = (triplet.a.last(), triplet.b.last()) else {
            return Err(format!("m{number} has no components"));
        };
        let flat = |factor: &str| -> Result<_, String> {
            let values = case.array(&name(factor))?.tensor::<2>().transpose();
            let count = values.shape().num_elements();
            Ok(values.reshape([count]))
        };
        let values = [(a.id, flat("A")?), (b.id, flat("B")?)].into();
        training.assign(values);
    }
    Ok(())
}
