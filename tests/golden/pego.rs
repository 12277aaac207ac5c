//! PEGO against reference values: a layer, or query and value of grouped-query attention.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Int, Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{AdapterConfig, Attach, Pego, PenaltyAt, each_adapted, each_adapter, penalty};
use lowrank_optim::AdamWConfig;

use super::support::bench::near;
use super::support::case::{Case, Outcome, host};

/// The adapted matrices, by the order of their names.
#[derive(Module, Debug)]
struct Layers {
    adapted: Vec<Dense>,
}

/// The matrix that is trained besides.
#[derive(Module, Debug)]
struct Head {
    weight: Param<Tensor<2>>,
}

pub fn run(case: &Case) -> Outcome {
    // A single matrix has no name.
    let names: Vec<String> = match case.config["adapted"].as_array() {
        Some(names) => names.iter().filter_map(|name| name.as_str()).map(|name| format!("{name}.")).collect(),
        None => vec![String::new()],
    };
    let (count, rank) = (case.count("N")?, case.count("r")?);
    let config = AdapterConfig::new("pego")
        .with_rank(rank)
        .with_alpha(case.number("scale")? * rank as f64)
        .with_option("adapters", count)
        .with_option("lambda", case.number("lam")?);
    let mut layers = attached(case, &names, &config)?;
    let mut head = case
        .has("head.W")
        .then(|| case.array("head.W"))
        .transpose()?
        .map(|head| Head { weight: Param::from_tensor(head.tensor::<2>().transpose().autodiff().require_grad()) });
    let lr = case.number("lr")?;
    let mut optimizer = AdamWConfig::new().init();
    let mut of_head = AdamWConfig::new().init();
    let mut steps = 0;
    while case.has(&format!("step{steps}.x")) {
        let of = |name: &str| format!("step{steps}.{name}");
        let terms = terms(&layers);
        for (name, [preserve, diversify]) in names.iter().zip(&terms) {
            near(case, &of(&format!("{name}preserve")), &host(preserve.clone()), 1e-5)?;
            near(case, &of(&format!("{name}diversify")), &host(diversify.clone()), 1e-5)?;
        }
        let sum = terms.into_iter().flatten().reduce(|sum, term| sum + term).ok_or("no adapted matrix")?;
        let mut grads = GradientsParams::from_grads(sum.backward(), &layers);
        let regulariser = |pego: &Pego| [&pego.a, &pego.b].map(|factor| grads.remove::<2>(factor.id));
        compare(case, &layers, &names, &of("grad_regulariser."), regulariser)?;

        let loss = loss(case, &layers, head.as_ref(), &names, steps)?;
        near(case, &of("loss"), &host(loss.clone()), 1e-5)?;
        let mut grads = GradientsParams::from_grads(loss.backward(), &layers);
        let total = |pego: &Pego| [&pego.a, &pego.b].map(|factor| grads.remove::<2>(factor.id));
        compare(case, &layers, &names, &of("grad."), total)?;
        // Comparing took the gradients.
        let mut grads = self::loss(case, &layers, head.as_ref(), &names, steps)?.backward();
        if let Some(trained) = head.take() {
            let grad = trained.weight.val().grad_remove(&mut grads).ok_or("the head has no gradient")?;
            near(case, &of("grad.head"), &host(grad.clone().transpose()), 1e-5)?;
            let mut own = GradientsParams::new();
            own.register(trained.weight.id, grad);
            let trained = of_head.step(lr, trained, own);
            near(case, &of("param.head"), &host(trained.weight.val().transpose()), 1e-5)?;
            head = Some(trained);
        }
        let grads = GradientsParams::from_grads(grads, &layers);
        layers = optimizer.step(lr, layers, grads);
        let values = |pego: &Pego| [&pego.a, &pego.b].map(|factor| Some(factor.val().inner()));
        compare(case, &layers, &names, &of("param."), values)?;
        steps += 1;
    }
    if steps == 0 {
        return Err("the case has no step".into());
    }
    for (layer, name) in layers.adapted.iter().zip(&names) {
        near(case, &format!("{name}merged"), &host(layer.weight.val().transpose()), 1e-5)?;
    }
    Ok(format!("terms, gradients and {steps} steps are equal"))
}

/// Loss of a step, with the terms.
fn loss(case: &Case, layers: &Layers, head: Option<&Head>, names: &[String], step: usize) -> Result<Tensor<1>, String> {
    let of = |name: &str| format!("step{step}.{name}");
    let logits = match head {
        None => layers.adapted[0].forward(case.array(&of("x"))?.tensor::<2>().autodiff()),
        Some(head) => {
            let attended = attention(case, layers, names, &of("x"))?;
            near(case, &of("attended"), &host(attended.clone()), 1e-5)?;
            let [rows, len, width] = attended.dims();
            let last: Tensor<2> = attended.narrow(1, len - 1, 1).reshape([rows, width]);
            last.matmul(head.weight.val())
        }
    };
    near(case, &of("logits"), &host(logits.clone()), 1e-5)?;
    let labels = TensorData::from(case.array(&of("y"))?.i32().as_slice());
    let labels = Tensor::<1, Int>::from_data(labels, &logits.device()).unsqueeze_dim::<2>(1);
    let task = log_softmax(logits, 1).gather(1, labels).mean().neg();
    near(case, &of("loss_c"), &host(task.clone()), 1e-5)?;
    Ok(match penalty(layers, PenaltyAt::Loss) {
        Some(penalty) => task + penalty,
        None => task,
    })
}

/// The matrices of a case with their adapters.
fn attached(case: &Case, names: &[String], config: &AdapterConfig) -> Result<Layers, String> {
    let mut given = BTreeMap::new();
    let mut adapted = Vec::new();
    for (place, name) in names.iter().enumerate() {
        let weight = case.array(&format!("{name}W"))?.tensor::<2>().transpose();
        adapted.push(Dense::from_parts(weight.autodiff(), None));
        let parts = |letter: &str, axis: usize| -> Result<TensorData, String> {
            let count = case.count("N")?;
            let parts: Result<Vec<Tensor<2>>, String> =
                (0..count).map(|i| Ok(case.array(&format!("{name}lora{i}.{letter}"))?.tensor())).collect();
            Ok(Tensor::cat(parts?, axis).into_data())
        };
        given.insert(format!("adapted.{place}"), [("a".into(), parts("A", 0)?), ("b".into(), parts("B", 1)?)].into());
    }
    let attach = Attach::new(config.clone()).with_tensors(given).factored();
    Ok(attach.to(Layers { adapted }).map_err(|error| error.to_string())?.0)
}

/// The bare terms of every matrix.
fn terms(layers: &Layers) -> Vec<[Tensor<1>; 2]> {
    let mut terms = Vec::new();
    each_adapted(layers, |_, weight, stack| {
        let pego = stack.stack[0].structure.downcast_ref::<Pego>().expect("a pego");
        terms.push(pego.terms(weight));
    });
    terms
}

/// Compares matrices of the shapes of A and B, adapter by adapter.
fn compare(
    case: &Case,
    layers: &Layers,
    names: &[String],
    word: &str,
    mut of: impl FnMut(&Pego) -> [Option<Tensor<2>>; 2],
) -> Result<(), String> {
    let mut found = Vec::new();
    each_adapter(layers, |_, stack| found.push(of(stack.stack[0].structure.downcast_ref::<Pego>().expect("a pego"))));
    for (name, [a, b]) in names.iter().zip(found) {
        let count = case.count("N")?;
        let [a, b] = [a.ok_or("A has no gradient")?, b.ok_or("B has no gradient")?];
        for (i, (a, b)) in a.chunk(count, 1).into_iter().zip(b.chunk(count, 0)).enumerate() {
            near(case, &format!("{word}{name}A{i}"), &host(a.transpose()), 1e-5)?;
            near(case, &format!("{word}{name}B{i}"), &host(b.transpose()), 1e-5)?;
        }
    }
    Ok(())
}

/// Causal attention of grouped queries, behind the output matrix.
fn attention(case: &Case, layers: &Layers, names: &[String], x: &str) -> Result<Tensor<3>, String> {
    let x = case.array(x)?.tensor::<3>().autodiff();
    let [rows, len, width] = x.dims();
    let [heads, groups] = [case.count("heads")?, case.count("kv_heads")?];
    let flat = x.reshape([rows * len, width]);
    let through = |name: &str| -> Result<Tensor<2>, String> {
        match names.iter().position(|adapted| adapted.trim_end_matches('.') == name) {
            Some(place) => Ok(layers.adapted[place].forward(flat.clone())),
            None => Ok(flat.clone().matmul(case.array(&format!("{name}.W"))?.tensor::<2>().transpose().autodiff())),
        }
    };
    let size = width / heads;
    let by_head = |values: Tensor<2>, count: usize| values.reshape([rows, len, count, size]).swap_dims(1, 2);
    let repeated = |values: Tensor<4>| {
        let repeated = values.unsqueeze_dim::<5>(2).repeat_dim(2, heads / groups);
        repeated.reshape([rows, heads, len, size])
    };
    let query = by_head(through("query")?, heads);
    let [key, value] = [repeated(by_head(through("key")?, groups)), repeated(by_head(through("value")?, groups))];
    let scores = query.matmul(key.transpose()).div_scalar((size as f64).sqrt());
    let later = Tensor::<2>::ones([len, len], &scores.device()).triu(1).mul_scalar(-1e9).unsqueeze::<4>();
    let mixed = softmax(scores + later, 3).matmul(value).swap_dims(1, 2).reshape([rows * len, width]);
    let output = case.array("output.W")?.tensor::<2>().transpose().autodiff();
    Ok(mixed.matmul(output).reshape([rows, len, width]))
}
