//! LoRA, its starts and DoRA: outputs, gradients, merged weights, training.

use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{AdapterConfig, GivenTensors, Scaling};
use lowrank_optim::{AdamWConfig, thin_svd};

use super::adapters::{Bench, adapter, attached_to, fresh_on, near, slope};
use super::case::{Case, Outcome, host};
use super::{peft, rules};

/// Fields of a structure by their names in cases.
pub type Names<'a> = &'a [(&'a str, &'a str)];

const FACTORS: Names = &[("a", "A"), ("b", "B")];

pub fn run(case: &Case) -> Outcome {
    if case.names().iter().any(|name| name.starts_with("merged.")) {
        return peft::folder(case);
    }
    match (case.has("grad_output"), case.config["variant"].as_str()) {
        (true, _) => gradients(case, &config(case, "lora")?, FACTORS),
        (_, Some("lora")) => training(case, &config(case, "lora")?, FACTORS, &[]),
        (_, Some(_)) => rules::lora(case, &config(case, "lora")?),
        _ => Err("is of no known kind".into()),
    }
}

/// Rank and scale of a case.
pub fn config(case: &Case, structure: &str) -> Result<AdapterConfig, String> {
    let config = AdapterConfig::new(structure).with_rank(case.count("rank")?).with_alpha(case.number("alpha")?);
    let scaling = if case.flag("rslora").unwrap_or(false) { Scaling::RootRank } else { Scaling::Rank };
    Ok(AdapterConfig { scaling: Some(scaling), ..config })
}

/// The layer `W` (and `bias`), bare.
pub fn bare(case: &Case) -> Result<Dense, String> {
    let weight = case.array("W")?.tensor::<2>().transpose().autodiff();
    let bias = if case.has("bias") { Some(case.array("bias")?.tensor::<1>().autodiff()) } else { None };
    Ok(Dense::from_parts(weight, bias))
}

/// Tensors of the case by the fields of the structure, their names with an ending.
pub fn tensors(case: &Case, names: Names, ending: &str) -> Result<GivenTensors, String> {
    let mut given = GivenTensors::new();
    for (field, name) in names {
        let array = case.array(&format!("{name}{ending}"))?;
        given.insert(field.to_string(), TensorData::new(array.f32(), array.shape.clone()));
    }
    Ok(given)
}

fn gradients(case: &Case, config: &AdapterConfig, names: Names) -> Outcome {
    let bench = attached_to(bare(case)?, config, tensors(case, names, "")?)?;
    let x = case.array("x")?.tensor::<2>().autodiff().require_grad();
    let y = bench.output(x.clone());
    near(case, "y", &host(y.clone().inner()), 1e-5)?;
    near(case, "merged_weight", &host(bench.weight().transpose()), 1e-5)?;
    if case.has("delta_weight") {
        let update: Tensor<2> = adapter(&bench).structure().update(&bench.weight()).inner();
        near(case, "delta_weight", &host(update.transpose()), 1e-5)?;
    }
    let mut grads = (y * case.array("grad_output")?.tensor::<2>().autodiff()).sum().backward();
    near(case, "grad_x", &host(x.grad_remove(&mut grads).ok_or("x has no gradient")?), 1e-5)?;
    slopes(case, &bench, GradientsParams::from_grads(grads, &bench), names, "")?;
    Ok("output, gradients and merged weight are equal".into())
}

/// Gradients of the trained tensors, their names with an ending.
fn slopes(case: &Case, bench: &Bench, mut grads: GradientsParams, names: Names, ending: &str) -> Result<(), String> {
    for tensor in adapter(bench).shapes() {
        let Some((_, name)) = names.iter().find(|(field, _)| *field == tensor.field) else { continue };
        near(case, &format!("grad_{name}{ending}"), &slope(&mut grads, &tensor)?, 1e-5)?;
    }
    Ok(())
}

/// AdamW on the mean squared error from tensors `<name>_0`, with others that do not change.
pub fn training(case: &Case, config: &AdapterConfig, trained: Names, kept: Names) -> Outcome {
    let mut given = tensors(case, trained, "_0")?;
    given.extend(tensors(case, kept, "")?);
    let mut bench = attached_to(bare(case)?, config, given)?;
    let betas = &case.config["betas"];
    let beta = |index: usize| betas[index].as_f64().ok_or_else(|| format!("configuration: betas is {betas}"));
    let mut optimizer = AdamWConfig::new()
        .with_beta_1(beta(0)?)
        .with_beta_2(beta(1)?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay")?)
        .init();
    let [lr, steps] = [case.number("lr")?, case.number("steps")?];
    let [x, target] = [case.array("x")?, case.array("target")?];
    let mut losses = Vec::new();
    for step in 0..steps as usize {
        let y = bench.output(x.at(step).tensor::<2>().autodiff());
        if step == 0 && case.has("y_0") {
            near(case, "y_0", &host(y.clone().inner()), 1e-5)?;
        }
        let loss = (y - target.at(step).tensor::<2>().autodiff()).square().mean();
        losses.push(loss.clone().inner().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), &bench);
        bench = optimizer.step(lr, bench, grads);
        for (tensor, data) in adapter(&bench).tensors() {
            let Some((_, name)) = trained.iter().find(|(field, _)| *field == tensor.field) else { continue };
            let name = format!("{name}_{}", step + 1);
            let ours: Vec<f32> = data.try_into_vec().map_err(|error| format!("{name}: {error:?}"))?;
            near(case, &name, &ours, 1e-5)?;
        }
        let whole = format!("W_effective_{}", step + 1);
        if case.has(&whole) {
            near(case, &whole, &host(bench.weight().transpose()), 1e-5)?;
        }
    }
    near(case, "loss", &losses, 1e-5)?;
    if case.has("merged_weight") {
        near(case, "merged_weight", &host(bench.weight().transpose()), 1e-5)?;
    }
    if case.has("lora_A_converted") {
        let [a, b] = adapter(&bench).change().ok_or("is not a product")?;
        near(case, "lora_A_converted", &host(a.inner().transpose()), 1e-5)?;
        let b = b.inner().div_scalar(case.number("scale")?);
        near(case, "lora_B_converted", &host(b.transpose()), 1e-5)?;
    }
    Ok(format!("{} steps are equal", losses.len()))
}

pub fn pissa(case: &Case) -> Outcome {
    let config = AdapterConfig { init: "pissa".into(), ..config(case, "lora")? };
    if case.has("A_0") {
        return training(case, &config, FACTORS, &[("origin.a", "A_0"), ("origin.b", "B_0")]);
    }
    let bench = fresh_on(bare(case)?, &config)?;
    near(case, "y", &host(bench.output(case.array("x")?.tensor::<2>().autodiff()).inner()), 1e-5)?;
    let attached = adapter(&bench);
    let weight = case.array("W")?.tensor::<2>().transpose();
    let product = attached.structure().update(&weight).inner();
    near(case, "scaled_product", &host(product.transpose()), 1e-5)?;
    let origin = attached.origin.as_ref().ok_or("nothing is taken from the weight")?;
    near(case, "W_residual", &host((weight.clone() - origin.delta().inner()).transpose()), 1e-5)?;
    let [a, b] = [&origin.a, &origin.b].map(|factor| factor.val().inner());
    near(case, "A_gram", &host(a.clone().matmul(a.transpose())), 1e-5)?;
    near(case, "B_gram", &host(b.clone().transpose().matmul(b)), 1e-5)?;
    singular_values(case, &weight)?;
    Ok("start and output are equal".into())
}

/// All singular values of a weight.
pub fn singular_values(case: &Case, weight: &Tensor<2>) -> Result<(), String> {
    let [d_in, d_out] = weight.dims();
    let values: Vec<f32> = thin_svd(weight, d_in.min(d_out)).values.iter().map(|value| *value as f32).collect();
    near(case, "singular_values", &values, 1e-5)
}

pub fn dora(case: &Case) -> Outcome {
    if case.names().iter().any(|name| name.starts_with("merged.")) {
        return peft::folder(case);
    }
    if !case.has("A_0") && !case.has("grad_output") {
        return Err("is of no known kind".into());
    }
    let config = config(case, "dora")?;
    let names: Names = &[("a", "A"), ("b", "B"), ("magnitude", "magnitude")];
    if case.has("A_0") {
        return training(case, &config, names, &[]);
    }
    let remark = gradients(case, &config, names)?;
    let start = adapter(&fresh_on(bare(case)?, &config)?);
    let lengths = start.tensors().into_iter().find(|(tensor, _)| tensor.field == "magnitude").ok_or("no lengths")?;
    near(case, "magnitude_init", &lengths.1.try_into_vec::<f32>().map_err(|error| format!("{error:?}"))?, 1e-5)?;
    // With the lengths that the columns have, the layer is that of plain LoRA.
    let lengths: Names = &[("a", "A"), ("b", "B"), ("magnitude", "weight_norm")];
    let even = attached_to(bare(case)?, &config, tensors(case, lengths, "")?)?;
    let plain = attached_to(bare(case)?, &self::config(case, "lora")?, tensors(case, FACTORS, "")?)?;
    let x = || Ok::<_, String>(case.array("x")?.tensor::<2>().autodiff());
    for (ours, theirs) in [(even.output(x()?), plain.output(x()?)), (even.weight(), plain.weight())] {
        let (ours, theirs) = (ours.inner(), theirs.inner());
        let share = (ours - theirs.clone()).abs().max() / theirs.abs().max();
        if share.into_scalar::<f32>() > 1e-5 {
            return Err("weight_norm is not the length of the columns".into());
        }
    }
    let exact = config.with_option("detach_norm", false);
    let bench = attached_to(bare(case)?, &exact, tensors(case, names, "")?)?;
    let y = bench.output(x()?) * case.array("grad_output")?.tensor::<2>().autodiff();
    let grads = GradientsParams::from_grads(y.sum().backward(), &bench);
    slopes(case, &bench, grads, FACTORS, "_without_detach")?;
    Ok(format!("{remark}, lengths and exact gradients too"))
}
