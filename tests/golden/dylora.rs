//! DyLoRA against reference values.

use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_models::Dense;
use lowrank_models::adapter::{
    Adapter, AdapterConfig, GivenTensors, Nested, PassInfo, PlainRule, RANK_OF_PASS, Resize, merged, resize,
};

use super::support::bench::{Bench, adapter, attached_to, near};
use super::support::case::{Array, Case, Outcome, host};
use super::support::rules::{Training, moments, text};

pub fn run(case: &Case) -> Outcome {
    match (case.has("A"), case.has("A.0")) {
        (true, false) => ranks(case),
        (false, true) => training(case),
        _ => Err("is of no known kind".into()),
    }
}

/// The layer of a case with an adapter of its tensors.
fn bench(case: &Case, update: &str, strict: bool, names: [&str; 2]) -> Result<Bench, String> {
    let config = AdapterConfig::new("nested")
        .with_rank(case.count("r_max")?)
        .with_alpha(case.number("alpha")?)
        .with_option("update", update)
        .with_option("strict", strict);
    let layer = Dense::from_parts(case.array("W")?.tensor::<2>().transpose().autodiff(), None);
    let [a, b] = [case.array(names[0])?, case.array(names[1])?];
    let mut given = GivenTensors::new();
    let mut put = |name: String, data: Tensor<2>| given.insert(name, data.into_data());
    if strict {
        for component in 0..a.shape[0] {
            put(format!("a.{component}"), a.tensor::<2>().narrow(0, component, 1));
            put(format!("b.{component}"), b.tensor::<2>().narrow(1, component, 1));
        }
    } else {
        put("a.0".into(), a.tensor());
        put("b.0".into(), b.tensor());
    }
    attached_to(layer, &config, given)
}

fn set_rank(bench: &Bench, rank: usize) {
    let values = [(RANK_OF_PASS.to_string(), rank as f64)].into();
    adapter(bench).control().set_pass(PassInfo { values, ..PassInfo::training(0, None) });
}

fn loss(y: Tensor<2>, target: Array) -> Tensor<1> {
    (y - target.tensor::<2>().autodiff()).square().mean().mul_scalar(0.5)
}

fn nested(adapter: &Adapter) -> Result<&Nested, String> {
    adapter.structure.downcast_ref::<Nested>().ok_or_else(|| "the adapter is nested".into())
}

fn ranks(case: &Case) -> Outcome {
    let largest = case.count("r_max")?;
    for rank in 1..=largest {
        for update in ["all", "frozen"] {
            let bench = bench(case, update, false, ["A", "B"])?;
            set_rank(&bench, rank);
            let x = case.array("x")?.tensor::<2>().autodiff().require_grad();
            let y = bench.output(x.clone());
            near(case, &format!("y.b{rank}"), &host(y.clone().inner()), 1e-5)?;
            let mut grads = loss(y, case.array("target")?).backward();
            let grad_x = x.grad_remove(&mut grads).ok_or("x has no gradient")?;
            near(case, &format!("grad_x.b{rank}"), &host(grad_x), 1e-5)?;
            let mut grads = GradientsParams::from_grads(grads, &bench);
            let adapter = adapter(&bench);
            let nested = nested(&adapter)?;
            for (factor, id) in [("A", nested.a[0].id), ("B", nested.b[0].id)] {
                let grad = grads.remove::<2>(id).ok_or_else(|| format!("{factor} has no gradient"))?;
                near(case, &format!("grad_{factor}.{update}.b{rank}"), &host(grad.transpose()), 1e-5)?;
            }
        }
        let bench = bench(case, "all", false, ["A", "B"])?;
        let leading = |_: &str, _: &Adapter| Some(Resize { keep: (0..rank).collect(), append: 0 });
        let (bench, _) = resize(bench, "default", leading).map_err(text)?;
        let bench = merged(bench).map_err(text)?;
        near(case, &format!("merged_W.b{rank}"), &host(bench.weight().transpose()), 1e-5)?;
    }
    Ok(format!("outputs, gradients and merged weights are equal at ranks 1 to {largest}"))
}

fn training(case: &Case) -> Outcome {
    let frozen = case.flag("frozen")?;
    let strict = case.config["strict"].as_bool().unwrap_or(false);
    let update = if frozen { "frozen" } else { "all" };
    let bench = bench(case, update, strict, ["A.0", "B.0"])?;
    let ranks = case.config["ranks"].as_array().ok_or("configuration: ranks")?;
    let mut training = Training::new(case, bench, &PlainRule {})?;
    for (step, rank) in ranks.iter().enumerate() {
        let rank = rank.as_u64().ok_or("configuration: ranks")? as usize;
        set_rank(&training.bench, rank);
        let y = training.bench.output(case.array(&format!("x.{step}"))?.tensor::<2>().autodiff());
        let loss = loss(y, case.array(&format!("target.{step}"))?);
        if case.has(&format!("loss.{step}")) {
            near(case, &format!("loss.{step}"), &host(loss.clone().inner()), 1e-5)?;
        }
        let grads = GradientsParams::from_grads(loss.backward(), &training.bench);
        training = training.step(grads);
        let adapter = adapter(&training.bench);
        let nested = nested(&adapter)?;
        let whole = |blocks: &[Param<Tensor<2>>], axis: usize| {
            let blocks = blocks.iter().map(|block| block.val().inner()).collect();
            host(Tensor::cat(blocks, axis).transpose())
        };
        near(case, &format!("A.{}", step + 1), &whole(&nested.a, 1), 1e-5)?;
        near(case, &format!("B.{}", step + 1), &whole(&nested.b, 0), 1e-5)?;
    }
    let adapter = adapter(&training.bench);
    let nested = nested(&adapter)?;
    let held = moments(training.optimizer.to_record())?;
    for (name, field) in [("m", "moment_1"), ("v", "moment_2")] {
        for (factor, blocks) in [("A", &nested.a), ("B", &nested.b)] {
            let name = format!("adam_{name}.{factor}");
            if !case.has(&name) {
                continue;
            }
            let [block] = blocks.as_slice() else { return Err(format!("{name} is of one block")) };
            let key = format!("{}.", block.id.val());
            let found = held.iter().find(|(held, _)| held.starts_with(&key) && held.contains(field));
            let (_, moment) = found.ok_or_else(|| format!("{name}: there are {:?}", held.keys()))?;
            near(case, &name, moment, 1e-5)?;
        }
    }
    Ok(format!("{} steps are equal", ranks.len()))
}
