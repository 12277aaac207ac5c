//! Cases of LoRA and its relatives: outputs, gradients, training.

use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{AdapterConfig, GivenTensors, Scaling};
use lowrank_optim::{AdamWConfig, thin_svd};

use super::bench::{Bench, adapter, attached_to, gradient, near};
use super::case::{Case, Outcome, host};

/// Fields of a structure by their names in cases.
pub type Names<'a> = &'a [(&'a str, &'a str)];

pub const FACTORS: Names = &[("a", "A"), ("b", "B")];

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

pub fn gradients(case: &Case, config: &AdapterConfig, names: Names) -> Outcome {
    let bench = attached_to(bare(case)?, config, tensors(case, names, "")?)?;
    let x = case.array("x")?.tensor::<2>().autodiff().require_grad();
    let y = bench.output(x.clone());
    near(case, "y", &host(y.clone().inner()), 1e-5)?;
    near(case, "merged_weight", &host(bench.weight().transpose()), 1e-5)?;
    if case.has("delta_weight") {
        let update: Tensor<2> = adapter(&bench).structure().delta_weight(&bench.weight()).unwrap().inner();
        near(case, "delta_weight", &host(update.transpose()), 1e-5)?;
    }
    let mut grads = (y * case.array("grad_output")?.tensor::<2>().autodiff()).sum().backward();
    near(case, "grad_x", &host(x.grad_remove(&mut grads).ok_or("x has no gradient")?), 1e-5)?;
    compare_gradients(case, &bench, GradientsParams::from_grads(grads, &bench), names, "")?;
    Ok("output, gradients and merged weight are equal".into())
}

/// Gradients of the trained tensors, their names with an ending.
pub fn compare_gradients(
    case: &Case,
    bench: &Bench,
    mut grads: GradientsParams,
    names: Names,
    ending: &str,
) -> Result<(), String> {
    for tensor in adapter(bench).shapes() {
        let Some((_, name)) = names.iter().find(|(field, _)| *field == tensor.field) else { continue };
        near(case, &format!("grad_{name}{ending}"), &gradient(&mut grads, &tensor)?, 1e-5)?;
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

/// All singular values of a weight.
pub fn singular_values(case: &Case, weight: &Tensor<2>) -> Result<(), String> {
    let [d_in, d_out] = weight.dims();
    let values: Vec<f32> = thin_svd(weight, d_in.min(d_out)).values.iter().map(|value| *value as f32).collect();
    near(case, "singular_values", &values, 1e-5)
}
