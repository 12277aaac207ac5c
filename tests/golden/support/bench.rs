//! Adapter structures against the authors' code: starts, outputs, updates, merged layers, gradients, training.
//!
//! Cases share the names of their tensors: `in.*` (the layer and a batch), `init.*`, `p.*` and `frozen.*` (tensors of the adapter), `exp.*` (at
//! `p.*`, where not said otherwise), `train.*`.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{
    Adapter, AdapterConfig, Attach, GivenTensors, NamedTensor, PenaltyAt, StepOf, add_after_clipping, drop_frozen,
    each_adapter, frozen_this_step, penalty,
};
use lowrank_optim::AdamWConfig;

use super::case::{Case, Outcome, host};

/// A single layer with an adapter on it.
#[derive(Module, Debug)]
pub struct Bench {
    layer: Dense,
}

/// The layer of a case, bare.
pub fn bare(case: &Case) -> Result<Dense, String> {
    let weight = case.array("in.weight")?.tensor::<2>().transpose();
    let bias = if case.has("in.bias") { Some(case.array("in.bias")?.tensor::<1>().autodiff()) } else { None };
    Ok(Dense::from_parts(weight.autodiff(), bias))
}

/// Tensors whose names begin with one of these words, by the fields of the structure: `d_0` is the first of the list `d`.
pub fn given(case: &Case, words: &[&str]) -> Result<GivenTensors, String> {
    let mut found = GivenTensors::new();
    for name in case.names() {
        let Some(field) = words.iter().find_map(|word| name.strip_prefix(&format!("{word}."))) else { continue };
        let array = case.array(&name)?;
        let field = match field.rsplit_once('_') {
            Some((list, place)) if place.parse::<usize>().is_ok() => format!("{list}.{place}"),
            _ => field.to_string(),
        };
        found.insert(field, TensorData::new(array.f32(), array.shape.clone()));
    }
    Ok(found)
}

/// The layer of a case with an adapter of given tensors.
pub fn attached(case: &Case, config: &AdapterConfig, tensors: GivenTensors) -> Result<Bench, String> {
    attached_to(bare(case)?, config, tensors)
}

/// A layer with an adapter of given tensors.
pub fn attached_to(layer: Dense, config: &AdapterConfig, tensors: GivenTensors) -> Result<Bench, String> {
    let tensors = BTreeMap::from([("layer".to_string(), tensors)]);
    let attach = Attach::new(config.clone()).with_tensors(tensors).factored();
    Ok(attach.to(Bench { layer }).map_err(|error| error.to_string())?.0)
}

/// The layer of a case with an adapter that begins by itself.
pub fn fresh(case: &Case, config: &AdapterConfig) -> Result<Bench, String> {
    fresh_on(bare(case)?, config)
}

/// A layer with an adapter that begins by itself.
pub fn fresh_on(layer: Dense, config: &AdapterConfig) -> Result<Bench, String> {
    let attach = Attach::new(config.clone()).factored();
    Ok(attach.to(Bench { layer }).map_err(|error| error.to_string())?.0)
}

/// The adapter of the layer.
pub fn adapter(bench: &Bench) -> Adapter {
    let mut found = None;
    each_adapter(bench, |_, adapter| found = adapter.stack.last().cloned());
    found.expect("an adapter was attached")
}

/// Within a share of the largest value.
pub fn near(case: &Case, name: &str, ours: &[f32], share: f64) -> Result<(), String> {
    let expected = case.array(name)?;
    expected.near(name, ours, share * expected.largest().max(1e-6), 0.0).map(|_| ())
}

/// A batch of the case.
pub fn batch(case: &Case, name: &str) -> Result<Tensor<2>, String> {
    Ok(case.array(name)?.tensor::<2>().autodiff())
}

impl Bench {
    /// A bare layer.
    pub fn new(layer: Dense) -> Self {
        Self { layer }
    }

    /// The output for an input of the case.
    pub fn output(&self, x: Tensor<2>) -> Tensor<2> {
        self.layer.forward(x)
    }

    /// The weight as layers of other crates see it, with its graph.
    pub fn composed(&self) -> Tensor<2> {
        self.layer.weight.val()
    }

    /// The gradients that follow from that of the weight, `[d_out, d_in]`.
    pub fn pulled(&self, gradient: Tensor<2>) -> GradientsParams {
        let loss = (self.composed() * Tensor::from_inner(gradient.transpose())).sum();
        GradientsParams::from_grads(loss.backward(), self)
    }

    /// The weight that the adapter stands on.
    pub fn base(&self) -> Tensor<2> {
        self.layer.weight.base().without_autodiff()
    }

    /// Its id.
    pub fn base_id(&self) -> burn::module::ParamId {
        self.layer.weight.id
    }

    /// The merged weight `[d_in, d_out]`.
    pub fn weight(&self) -> Tensor<2> {
        self.layer.weight.val().inner()
    }

    pub fn bias(&self) -> Option<Tensor<1>> {
        let adapter = adapter(self);
        let base = self.layer.weight.base();
        let bias = self.layer.bias.as_ref().map(|bias| bias.val());
        adapter.structure().merged_bias(&base, bias).map(Tensor::inner)
    }
}

/// Everything that the cases of most structures hold. `kept` are the structure's frozen tensors by field.
pub fn common(case: &Case, config: &AdapterConfig, kept: &GivenTensors) -> Outcome {
    let with = |words: &[&str]| -> Result<GivenTensors, String> {
        let mut tensors = given(case, words)?;
        tensors.extend(kept.clone());
        Ok(tensors)
    };
    let x = || batch(case, "in.x");
    let init = attached(case, config, with(&["init"])?)?;
    if case.has("exp.y_init") {
        near(case, "exp.y_init", &host(init.output(x()?).inner()), 1e-5)?;
    }
    adapter(&init).control().switch(false);
    near(case, "exp.y_base", &host(init.output(x()?).inner()), 1e-5)?;
    adapter(&init).control().switch(true);

    let bench = attached(case, config, with(&["p"])?)?;
    let tracked = x()?.require_grad();
    let y = bench.output(tracked.clone());
    near(case, "exp.y", &host(y.clone().inner()), 1e-5)?;
    near(case, "exp.merged_w", &host(bench.weight().transpose()), 1e-5)?;
    near(case, "exp.delta_w", &host((bench.weight() - bench.layer.weight.base().inner()).transpose()), 2e-5)?;
    if case.has("exp.merged_b") {
        let bias = bench.bias().ok_or("the merged layer has no bias")?;
        near(case, "exp.merged_b", &host(bias), 1e-5)?;
    }
    let mut grads = (y * batch(case, "in.grad_y")?).sum().backward();
    let gradient = tracked.grad_remove(&mut grads).ok_or("x has no gradient")?;
    near(case, "exp.grad.x", &host(gradient), 1e-5)?;
    gradients(case, &bench, GradientsParams::from_grads(grads, &bench), "exp.grad")?;
    penalties(case, &bench)?;
    // Where the configuration does not say otherwise.
    let from = if case.config["train_starts_from"].as_str() == Some("p.*") { "p" } else { "init" };
    training(case, attached(case, config, with(&[from])?)?, true)?;
    Ok("start, output, update, merged layer, gradients and training are equal".into())
}

/// Gradients of the adapter's tensors, in the layout of the case.
pub fn gradients(case: &Case, bench: &Bench, mut grads: GradientsParams, word: &str) -> Result<(), String> {
    for tensor in adapter(bench).shapes() {
        let name = format!("{word}.{}", tensor.field.replace('.', "_"));
        if !case.has(&name) {
            continue;
        }
        match gradient(&mut grads, &tensor) {
            Ok(gradient) => near(case, &name, &gradient, 1e-5)?,
            // A term need not touch every tensor.
            Err(_) if word == "exp.reg_grad" && case.array(&name)?.largest() == 0.0 => {}
            Err(reason) => return Err(reason),
        }
    }
    Ok(())
}

/// The gradient of a tensor, in the layout of the case.
pub fn gradient(grads: &mut GradientsParams, tensor: &NamedTensor) -> Result<Vec<f32>, String> {
    let none = || format!("{} has no gradient", tensor.field);
    Ok(match tensor.shape.len() {
        1 => host(grads.remove::<1>(tensor.id).ok_or_else(none)?),
        2 => {
            let gradient = grads.remove::<2>(tensor.id).ok_or_else(none)?;
            host(if tensor.transposed { gradient.transpose() } else { gradient })
        }
        3 => host(grads.remove::<3>(tensor.id).ok_or_else(none)?),
        _ => host(grads.remove::<4>(tensor.id).ok_or_else(none)?),
    })
}

/// `exp.reg` and its gradients are those of the bare term; ours carries its weight.
pub fn penalties(case: &Case, bench: &Bench) -> Result<(), String> {
    let weight = case.config["train"]["reg_weight"].as_f64().unwrap_or(0.0);
    if !case.has("exp.reg") || weight == 0.0 {
        return Ok(());
    }
    // What enters after clipping is divided by the learning rate.
    let factor = if penalty(bench, PenaltyAt::Loss).is_some() { weight } else { weight * lr(case)? };
    regulariser(case, bench, factor)
}

/// The penalty over `factor` is the bare term.
pub fn regulariser(case: &Case, bench: &Bench, factor: f64) -> Result<(), String> {
    let sum = penalty(bench, PenaltyAt::Loss).or_else(|| penalty(bench, PenaltyAt::AfterClipping));
    let sum = sum.ok_or("the structure has no penalty")?.div_scalar(factor);
    near(case, "exp.reg", &host(sum.clone().inner()), 1e-5)?;
    gradients(case, bench, GradientsParams::from_grads(sum.backward(), bench), "exp.reg_grad")
}

pub fn lr(case: &Case) -> Result<f64, String> {
    let train = &case.config["train"];
    train["lr"].as_f64().or(train["lr_coef"].as_f64()).ok_or_else(|| "configuration: train.lr".into())
}

/// AdamW with the loss `0.5 mean((y - target)^2)`: losses, tensors on the way where they are the case's own, the merged layer.
pub fn training(case: &Case, mut bench: Bench, tensors: bool) -> Result<(), String> {
    let train = &case.config["train"];
    let number = |key: &str| train[key].as_f64().ok_or_else(|| format!("configuration: train.{key}"));
    let steps = train["steps"].as_u64().ok_or("configuration: train.steps")?;
    let mut optimizer = AdamWConfig::new()
        .with_beta_1(number("beta1")?)
        .with_beta_2(number("beta2")?)
        .with_epsilon(number("eps")?)
        .with_weight_decay(number("weight_decay")?)
        .init();
    // Tensors with a learning rate of their own have an optimizer of their own.
    let lr = lr(case)?;
    let attached = adapter(&bench);
    for tensor in attached.shapes() {
        let scale = attached.structure().lr_scale(&tensor.field);
        if scale != 1.0 {
            let own = AdamWConfig::new()
                .with_beta_1(number("beta1")?)
                .with_beta_2(number("beta2")?)
                .with_epsilon(number("eps")?)
                .with_weight_decay(number("weight_decay")?)
                .with_lr_scale(scale);
            let group = burn::module::ParamGroup::from_ids(vec![tensor.id]);
            optimizer = optimizer.with_group(group, own.build(), None);
        }
    }
    drop(attached);
    let mut losses = Vec::new();
    for step in 0..steps {
        let error = bench.output(batch(case, "in.x")?) - batch(case, "in.target")?;
        let loss = error.square().mean().mul_scalar(0.5);
        losses.push(loss.clone().inner().into_scalar::<f32>());
        let whole = match penalty(&bench, PenaltyAt::Loss) {
            Some(penalty) => loss + penalty,
            None => loss,
        };
        let grads = GradientsParams::from_grads(whole.backward(), &bench);
        let grads = add_after_clipping(&bench, grads, lr).map_err(|error| error.to_string())?;
        let grads = drop_frozen(&bench, grads, &frozen_this_step(&bench, StepOf { step, total: Some(steps) }));
        bench = optimizer.step(lr, bench, grads);
        for (tensor, data) in adapter(&bench).tensors() {
            // Counted from 1.
            let name = format!("train.{}.{}", step + 1, tensor.field.replace('.', "_"));
            if tensors && case.has(&name) {
                let ours: Vec<f32> = data.try_into_vec().map_err(|error| format!("{name}: {error:?}"))?;
                near(case, &name, &ours, 5e-5)?;
            }
        }
    }
    near(case, "train.loss", &losses, 5e-5)?;
    near(case, "train.merged_w", &host(bench.weight().transpose()), 5e-5)?;
    if case.has("train.merged_b") {
        near(case, "train.merged_b", &host(bench.bias().ok_or("the merged layer has no bias")?), 5e-5)?;
    }
    Ok(())
}
