//! ReLoRA: schedule, and training with restarts.

use burn::optim::Optimizer;
use burn::tensor::Tensor;
use lowrank_models::linear::LinearLayer;
use lowrank_models::linear::relora::{ReLora, ReLoraOptions};
use lowrank_optim::{AdamW, AdamWConfig, AdamWState, MomentReset, ResetMoments};
use lowrank_train::engine::{Restarts, Schedule, ScheduleKind};

use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    match (case.has("W_0"), case.has("lr_multiplier")) {
        (true, _) => training(case),
        (false, true) => rates(case),
        _ => Err("is of no known kind".into()),
    }
}

fn schedule(case: &Case, total: usize) -> Result<Schedule, String> {
    let steps = |key: &str| case.count(key).map(|count| count as u64);
    Ok(Schedule {
        kind: ScheduleKind::CosineRestarts,
        peak: 1.0,
        warmup_steps: steps("first_warmup_steps")?,
        total_steps: Some(total as u64),
        final_fraction: case.number("min_lr_ratio")?,
        decay_fraction: 0.0,
        restarts: Restarts {
            every: case.count("restart_every").or_else(|_| case.count("reset_every"))? as u64,
            warmup_steps: steps("restart_warmup_steps")?,
            adjust_steps: steps("adjust_step").unwrap_or(0),
            in_warmup: false,
        },
    })
}

fn check_rates(case: &Case, schedule: &Schedule) -> Result<(), String> {
    let expected = case.array("lr_multiplier")?;
    let ours: Vec<f32> = (1..=expected.values.len() as u64).map(|step| schedule.rate(step) as f32).collect();
    expected.near("lr_multiplier", &ours, 1e-6, 0.0).map(|_| ())
}

fn rates(case: &Case) -> Outcome {
    check_rates(case, &schedule(case, case.count("total_steps")?)?)?;
    Ok("all rates are equal".into())
}

/// A factor in training.
struct Factor {
    name: &'static str,
    state: Option<AdamWState<2>>,
}

impl Factor {
    fn step(&mut self, optimizer: &AdamW, lr: f64, w: Tensor<2>, g: Tensor<2>) -> Tensor<2> {
        let (w, state) = optimizer.step(lr, w, g, self.state.take());
        self.state = state;
        w
    }

    fn check(&self, case: &Case, when: &str) -> Result<(), String> {
        let state = self.state.as_ref().ok_or("no state")?;
        for (moment, tensor) in [("exp_avg", &state.moment_1), ("exp_avg_sq", &state.moment_2)] {
            let name = format!("{moment}_{}_{when}", self.name);
            let expected = case.array(&name)?;
            let ours = host(tensor.clone().transpose());
            expected.near(&name, &ours, 1e-5 * expected.largest().max(1e-6), 1e-5)?;
            if expected.values.iter().zip(&ours).any(|(expected, ours)| (*expected == 0.0) != (*ours == 0.0)) {
                return Err(format!("{name} has its zeros elsewhere"));
            }
        }
        Ok(())
    }

    fn reset(&mut self, case: &Case, optimizer: &AdamW, keep: MomentReset, number: u64) -> Result<(), String> {
        let restart = number - 1;
        let mut masks = Vec::new();
        if let MomentReset::Random(_) = keep {
            for moment in ["exp_avg", "exp_avg_sq"] {
                let mask = case.array(&format!("mask_{moment}_{}_{restart}", self.name))?.tensor::<2>();
                masks.push(host(mask.transpose()));
            }
            masks.reverse();
        }
        let mut change = |values: &mut [f32]| match masks.pop() {
            // What the lot said.
            Some(mask) => values.iter_mut().zip(mask).for_each(|(value, kept)| *value *= kept),
            None => keep.apply(values, [0, 0, number]),
        };
        self.state = self.state.take().map(|state| optimizer.reset(state, &mut change));
        Ok(())
    }
}

fn keep(case: &Case) -> Result<MomentReset, String> {
    Ok(match case.word("reset_mode")? {
        "zero" => MomentReset::Zero,
        "magnitude" => MomentReset::Magnitude(case.number("reset_ratio")?),
        "random" => MomentReset::Random(case.number("reset_ratio")?),
        other => return Err(format!("configuration: reset_mode is {other}")),
    })
}

fn training(case: &Case) -> Outcome {
    let steps = case.count("steps")?;
    let schedule = schedule(case, steps)?;
    check_rates(case, &schedule)?;
    let betas = case.config["betas"].as_array().ok_or("configuration: betas")?;
    let beta = |place: usize| betas[place].as_f64().ok_or("configuration: betas");
    let optimizer = AdamWConfig::new()
        .with_beta_1(beta(0)?)
        .with_beta_2(beta(1)?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay")?)
        .build();
    let keep = keep(case)?;
    let options = ReLoraOptions { reset_every: case.count("reset_every")? as u64, ..Default::default() };
    let stored = |name: &str| Ok::<_, String>(case.array(name)?.tensor::<2>().transpose());
    let tracked = |x: Tensor<2>| x.autodiff().require_grad();
    let layer = |w: Tensor<2>, a: Tensor<2>, b: Tensor<2>, alpha: f64| {
        ReLora::from_parts(w.autodiff(), tracked(a), tracked(b), alpha)
    };
    let alpha = case.number("alpha")?;
    let mut net = layer(stored("W_0")?, stored("A_0")?, stored("B_0")?, alpha);
    let (mut a, mut b) = (Factor { name: "A", state: None }, Factor { name: "B", state: None });
    let (x, target, losses) = (case.array("x")?, case.array("target")?, case.array("loss")?);
    let (mut worst, mut restarts) = (0f64, Vec::new());
    for step in 1..=steps {
        let input = |array: &super::support::case::Array| array.at(step - 1).tensor::<2>().autodiff();
        let loss = (net.forward(input(&x)) - input(&target)).square().mean();
        let ours = loss.clone().into_scalar::<f32>();
        let expected = losses.values[step - 1];
        if (f64::from(ours) - expected).abs() > 1e-5 * expected.abs().max(1e-3) {
            return Err(format!("loss of update {step} is {ours} instead of {expected}"));
        }
        let mut grads = loss.backward();
        let mut gradient = |x: Tensor<2>| x.grad_remove(&mut grads).ok_or("a factor has no gradient");
        let (da, db) = (gradient(net.a.val())?, gradient(net.b.val())?);
        let lr = case.number("lr")? * schedule.rate(step as u64);
        let new_a = a.step(&optimizer, lr, net.a.val().inner(), da);
        let new_b = b.step(&optimizer, lr, net.b.val().inner(), db);
        net = layer(net.weight.val().inner(), new_a, new_b, alpha);
        if let Some(number) = options.restart_after(step as u64) {
            let restart = number - 1;
            for factor in [&mut a, &mut b] {
                factor.check(case, &format!("before_reset_{restart}"))?;
                factor.reset(case, &optimizer, keep, number)?;
                factor.check(case, &format!("after_reset_{restart}"))?;
            }
            net.restart(stored(&format!("A_restart_{restart}"))?);
            restarts.push(step);
        }
        for (name, ours) in [
            (format!("A_{step}"), net.a.val().inner()),
            (format!("B_{step}"), net.b.val().inner()),
            (format!("W_{step}"), net.weight.val().inner()),
            (format!("W_effective_{step}"), net.to_dense().ok_or("a layer has no dense weight")?),
        ] {
            worst = worst.max(case.array(&name)?.near(&name, &host(ours.transpose()), 1e-5, 1e-5)?);
        }
    }
    let expected: Vec<usize> = case.config["reset_after_updates"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|u| Some(u.as_u64()? as usize))
        .collect();
    if restarts != expected {
        return Err(format!("restarts after updates {restarts:?} instead of {expected:?}"));
    }
    Ok(format!("parts within {worst:.1e} over {} restarts", restarts.len()))
}
