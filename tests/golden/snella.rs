//! SNELL and SNELLA against reference values: layers, the sharing of a budget, and training with it.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{
    AdapterConfig, Attach, GivenTensors, Snell, SnellA, SnellaScores, budget, each_adapter, shared_out,
};
use lowrank_models::ops::quantile_of_magnitudes;
use lowrank_optim::AdamWConfig;

use super::support::bench::{adapter, attached_to, batch, near};
use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    if case.has("scores.0") {
        return allocation(case);
    }
    match case.has("m0.W") {
        true => training(case),
        false => layer(case),
    }
}

/// The structure of a case.
fn config(case: &Case) -> Result<AdapterConfig, String> {
    let heads = case.count("heads")?;
    let coefficients = case.array("coef")?;
    let coef = coefficients.values.first().copied().ok_or("coef is empty")?;
    let alternating =
        coefficients.values.iter().enumerate().all(|(head, value)| *value == if head % 2 == 0 { coef } else { -coef });
    if !alternating || coefficients.values.len() != heads {
        return Err(format!("the coefficients {:?} do not alternate", coefficients.values));
    }
    Ok(AdapterConfig::new("snell")
        .with_rank(case.count("low_rank_dim")?)
        .with_option("heads", heads)
        .with_option("coef", coef)
        .with_option("mode", case.word("mode")?)
        .with_option("mixture", case.flag("mixture")?))
}

fn file(case: &Case, name: &str) -> Result<TensorData, String> {
    let array = case.array(name)?;
    Ok(TensorData::new(array.f32(), array.shape.clone()))
}

fn layer(case: &Case) -> Outcome {
    let (config, sparsity, mixture) = (config(case)?, case.number("sparsity")?, case.flag("mixture")?);
    let mut tensors = GivenTensors::from([
        ("p".into(), file(case, "In")?),
        ("q".into(), file(case, "Out")?),
        ("sparsity".into(), TensorData::new(Snell::stored_sparsity(sparsity), [3])),
    ]);
    const MIXTURE: [&str; 3] = ["alpha", "gamma", "beta"];
    if mixture {
        let values: Result<Vec<f32>, String> =
            MIXTURE.iter().map(|name| Ok(case.array(&format!("mix_{name}"))?.f32()[0])).collect();
        tensors.insert("mixture".into(), TensorData::new(values?, [3]));
    }
    let layer = Dense::from_parts(case.array("W")?.tensor::<2>().transpose().autodiff(), None);
    let bench = attached_to(layer, &config, tensors)?;
    let adapter = adapter(&bench);
    let own = adapter.structure.downcast_ref::<Snell>().ok_or("the adapter is not snell")?;
    let kernel = own.kernel().inner();
    near(case, "merged_kernel", &host(kernel.clone().transpose()), 1e-5)?;
    let update = (own_update(own)).transpose();
    near(case, "delta_W", &host(update.clone()), 2e-5)?;
    let is_sparse = case.word("mode")? != "none" && (mixture || sparsity > 0.0);
    if is_sparse {
        near(case, "threshold", &[quantile_of_magnitudes(&host(kernel), sparsity) as f32], 1e-5)?;
    }
    let mask: Vec<f32> = host(update).iter().map(|value| f32::from(u8::from(*value != 0.0))).collect();
    near(case, "mask", &mask, 0.0)?;
    let y = bench.output(batch(case, "x")?);
    near(case, "y", &host(y.clone().inner()), 1e-5)?;
    let loss = (y - batch(case, "target")?).square().mean().mul_scalar(0.5);
    near(case, "loss", &host(loss.clone().inner()), 1e-5)?;
    let mut grads = GradientsParams::from_grads(loss.backward(), &bench);
    for (name, id) in [("grad_In", own.p.id), ("grad_Out", own.q.id)] {
        near(case, name, &host(grads.remove::<3>(id).ok_or("no gradient")?), 1e-5)?;
    }
    if let Some(mixture) = &own.mixture {
        let grad = host(grads.remove::<1>(mixture.id).ok_or("no gradient")?);
        for (name, grad) in MIXTURE.iter().zip(grad) {
            near(case, &format!("grad_mix_{name}"), &[grad], 1e-5)?;
        }
    }
    near(case, "merged_W", &host(bench.weight().transpose()), 1e-5)?;
    Ok("kernel, threshold, update, output and gradients are equal".into())
}

fn own_update(own: &Snell) -> Tensor<2> {
    use lowrank_models::adapter::Structure;
    match own.delta_weight(&own.kernel()) {
        Some(update) => update.inner(),
        None => unreachable!("the structure has an update"),
    }
}

fn whole(values: &[f64]) -> Vec<u64> {
    values.iter().map(|value| *value as u64).collect()
}

fn allocation(case: &Case) -> Outcome {
    let count = (0..).take_while(|number| case.has(&format!("scores.{number}"))).count();
    for number in 0..count {
        let array = |what: &str| case.array(&format!("{what}.{number}"));
        let given = shared_out(&array("scores")?.values, array("volume")?.values[0], &whole(&array("caps")?.values));
        let given: Vec<f32> = given.into_iter().map(|given| given as f32).collect();
        near(case, &format!("alloc.{number}"), &given, 0.0)?;
    }
    Ok(format!("{count} budgets are shared equally"))
}

/// Layers beside each other.
#[derive(Module, Debug)]
struct Several {
    layers: Vec<Dense>,
}

fn adapters(model: &Several) -> Vec<Snell> {
    let mut found = Vec::new();
    each_adapter(model, |_, stack| {
        found.extend(stack.stack[0].structure.downcast_ref::<Snell>().cloned());
    });
    found
}

/// Puts values in place of those of parameters.
struct Put(BTreeMap<ParamId, Tensor<1>>);

impl ModuleMapper for Put {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.remove(&param.id) {
            Some(values) => param.map(|old| Tensor::from_inner(values.reshape(old.dims()))),
            None => param,
        }
    }
}

fn training(case: &Case) -> Outcome {
    let options = SnellA {
        initial_sparsity: case.number("initial_sparsity")?,
        target_sparsity: case.number("target_sparsity")?,
        period: None,
        t_init: case.count("t_init")? as u64,
        t_final: case.count("t_final")? as u64,
        interval: case.count("interval")? as u64,
        beta1: case.number("beta1")?,
        beta2: case.number("beta2")?,
    };
    let config = config(case)?.with_option("sparsity", options.initial_sparsity);
    let count = (0..).take_while(|number| case.has(&format!("m{number}.W"))).count();
    let mixture = case.flag("mixture")?;
    let mut layers = Vec::new();
    let mut tensors = BTreeMap::new();
    for number in 0..count {
        let weight = case.array(&format!("m{number}.W"))?.tensor::<2>().transpose();
        layers.push(Dense::from_parts(weight.autodiff(), None));
        let mut own = GivenTensors::from([
            ("p".to_string(), file(case, &format!("m{number}.In.0"))?),
            ("q".to_string(), file(case, &format!("m{number}.Out.0"))?),
            ("sparsity".to_string(), TensorData::new(Snell::stored_sparsity(options.initial_sparsity), [3])),
        ]);
        if mixture {
            let start = case.config["mix_init"].as_array().ok_or("configuration: mix_init")?;
            let start: Vec<f32> = start.iter().filter_map(|value| Some(value.as_f64()? as f32)).collect();
            own.insert("mixture".to_string(), TensorData::new(start, [3]));
        }
        tensors.insert(format!("layers.{number}"), own);
    }
    let attach = Attach::new(config).with_tensors(tensors).factored();
    let mut model = attach.to(Several { layers }).map_err(|error| error.to_string())?.0;
    let number = |place: usize| case.config["betas"][place].as_f64().ok_or("configuration: betas");
    let mut optimizer = AdamWConfig::new()
        .with_beta_1(number(0)?)
        .with_beta_2(number(1)?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay")?)
        .init();
    let (epochs, steps) = (case.count("epochs")?, case.count("steps_per_epoch")?);
    let caps: Vec<u64> = adapters(&model).iter().map(|own| (own.p.dims()[1] * own.q.dims()[1]) as u64).collect();
    let mut scores = SnellaScores::default();
    let (mut volumes, mut sparsities) = (Vec::new(), Vec::new());
    for epoch in 0..epochs {
        let (volume, changes) = budget(&options, &caps, epoch as u64, epochs as u64);
        volumes.push(volume as f32);
        let is_told = case.has(&format!("alloc.{epoch}"));
        if changes != is_told {
            return Err(format!("epoch {epoch}: the budget is shared out: {changes}, in the case: {is_told}"));
        }
        if changes {
            let layers: Vec<f32> = scores.layers(&model).iter().map(|score| *score as f32).collect();
            near(case, &format!("layer_score.{epoch}"), &layers, 1e-4)?;
            let (given, sparsities) = scores.allocate(&model, volume);
            model = model.map(&mut Put(sparsities));
            let given: Vec<f32> = given.into_iter().map(|given| given as f32).collect();
            near(case, &format!("alloc.{epoch}"), &given, 0.0)?;
        }
        sparsities.extend(adapters(&model).iter().map(|own| own.sparsity() as f32));
        for step in epoch * steps..(epoch + 1) * steps {
            let mut whole: Option<Tensor<1>> = None;
            for (number, layer) in model.layers.iter().enumerate() {
                let name = |what: &str| format!("m{number}.{what}.{step}");
                let error = layer.forward(batch(case, &name("x"))?) - batch(case, &name("target"))?;
                let loss = error.square().mean().mul_scalar(0.5);
                near(case, &name("loss"), &host(loss.clone().inner()), 5e-5)?;
                whole = Some(match whole {
                    Some(sum) => sum + loss,
                    None => loss,
                });
            }
            let grads = GradientsParams::from_grads(whole.ok_or("no layer")?.backward(), &model);
            let mut seen = GradientsParams::new();
            for own in adapters(&model) {
                for id in [own.p.id, own.q.id] {
                    seen.register(id, grads.get::<3>(id).ok_or("no gradient")?);
                }
            }
            model = optimizer.step(case.number("lr")?, model, grads);
            scores.advance(&options, &model, &seen);
        }
    }
    near(case, "volume", &volumes, 1e-6)?;
    near(case, "sparsity", &sparsities, 1e-6)?;
    for (number, own) in adapters(&model).iter().enumerate() {
        near(case, &format!("m{number}.In.final"), &host(own.p.val().inner()), 1e-4)?;
        near(case, &format!("m{number}.Out.final"), &host(own.q.val().inner()), 1e-4)?;
        if let Some(mixture) = &own.mixture {
            near(case, &format!("m{number}.mix.final"), &host(mixture.val().inner()), 1e-4)?;
        }
    }
    Ok(format!("{epochs} epochs with shared sparsity are equal"))
}
