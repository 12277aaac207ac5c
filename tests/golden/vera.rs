//! VeRA against reference values.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::optim::GradientsParams;
use lowrank_models::Dense;
use lowrank_models::adapter::{AdapterConfig, Attach, SHARED, each_adapter};

use super::support::bench::{gradient, near};
use super::support::case::{Case, Outcome, host};
use super::support::factors::{Names, tensors, training};

const PAIR: Names = &[("vera_a", "shared_A"), ("vera_b", "shared_B")];

const SCALINGS: Names = &[("lambda_d", "lambda_d"), ("lambda_b", "lambda_b")];

/// Layers that share a pair.
#[derive(Module, Debug)]
struct Layers {
    layers: Vec<Dense>,
}

pub fn run(case: &Case) -> Outcome {
    let config = AdapterConfig::new("vera").with_rank(case.count("rank")?);
    if case.has("lambda_d_0") {
        return training(case, &config, SCALINGS, PAIR);
    }
    let mut layers = Vec::new();
    let mut given = BTreeMap::from([(SHARED.to_string(), tensors(case, PAIR, "")?)]);
    while case.has(&format!("layer{}.W", layers.len())) {
        let name = format!("layer{}", layers.len());
        let weight = case.array(&format!("{name}.W"))?.tensor::<2>().transpose().autodiff();
        let d = format!("{name}.lambda_d");
        let b = format!("{name}.lambda_b");
        given.insert(format!("layers.{}", layers.len()), tensors(case, &[("lambda_d", &d), ("lambda_b", &b)], "")?);
        layers.push(Dense::from_parts(weight, None));
    }
    let count = layers.len();
    let attach = Attach::new(config).with_tensors(given).factored();
    let (model, report) = attach.to(Layers { layers }).map_err(|error| error.to_string())?;
    if report.trained() != case.count("trainable")? {
        return Err(format!("{} values are trained", report.trained()));
    }
    let mut adapters = Vec::new();
    each_adapter(&model, |_, adapter| adapters.extend(adapter.stack.clone()));
    for (place, (layer, attached)) in model.layers.iter().zip(adapters).enumerate() {
        let named = |what: &str| format!("layer{place}.{what}");
        let x = case.array(&named("x"))?.tensor::<2>().autodiff().require_grad();
        let y = layer.forward(x.clone());
        near(case, &named("y"), &host(y.clone().inner()), 1e-5)?;
        let update = attached.structure().delta_weight(&layer.weight.base()).unwrap().inner();
        near(case, &named("delta_weight"), &host(update.transpose()), 1e-5)?;
        near(case, &named("merged_weight"), &host(layer.weight.val().inner().transpose()), 1e-5)?;
        let mut grads = (y * case.array(&named("grad_output"))?.tensor::<2>().autodiff()).sum().backward();
        near(case, &named("grad_x"), &host(x.grad_remove(&mut grads).ok_or("x has no gradient")?), 1e-5)?;
        let mut grads = GradientsParams::from_grads(grads, &model);
        for tensor in attached.shapes() {
            near(case, &named(&format!("grad_{}", tensor.field)), &gradient(&mut grads, &tensor)?, 1e-5)?;
        }
    }
    Ok(format!("{count} layers are equal"))
}
