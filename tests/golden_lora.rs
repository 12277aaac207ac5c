//! LoRA: output, gradients, merged weight.

use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{AdapterConfig, GivenTensors, Scaling};

use super::adapters::{Bench, adapter, attached_to, near, slope};
use super::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    match case.has("grad_output") {
        true => gradients(case),
        false => Err("is of no known kind".into()),
    }
}

fn config(case: &Case) -> Result<AdapterConfig, String> {
    let config = AdapterConfig::new("lora").with_rank(case.count("rank")?).with_alpha(case.number("alpha")?);
    let scaling = if case.flag("rslora").unwrap_or(false) { Scaling::RootRank } else { Scaling::Rank };
    Ok(AdapterConfig { scaling: Some(scaling), ..config })
}

/// The layer `W` (and `bias`) with tensors of the case, `(field, name)`.
fn layer(case: &Case, config: &AdapterConfig, tensors: &[(&str, &str)]) -> Result<Bench, String> {
    let weight = case.array("W")?.tensor::<2>().transpose().autodiff();
    let bias = if case.has("bias") { Some(case.array("bias")?.tensor::<1>().autodiff()) } else { None };
    let mut given = GivenTensors::new();
    for (field, name) in tensors {
        let array = case.array(name)?;
        given.insert(field.to_string(), TensorData::new(array.f32(), array.shape.clone()));
    }
    attached_to(Dense::from_parts(weight, bias), config, given)
}

fn gradients(case: &Case) -> Outcome {
    let bench = layer(case, &config(case)?, &[("a", "A"), ("b", "B")])?;
    let x = case.array("x")?.tensor::<2>().autodiff().require_grad();
    let y = bench.output(x.clone());
    near(case, "y", &host(y.clone().inner()), 1e-5)?;
    near(case, "merged_weight", &host(bench.weight().transpose()), 1e-5)?;
    let update: Tensor<2> = adapter(&bench).structure().update(&bench.weight()).inner();
    near(case, "delta_weight", &host(update.transpose()), 1e-5)?;
    let mut grads = (y * case.array("grad_output")?.tensor::<2>().autodiff()).sum().backward();
    near(case, "grad_x", &host(x.grad_remove(&mut grads).ok_or("x has no gradient")?), 1e-5)?;
    let mut grads = GradientsParams::from_grads(grads, &bench);
    for tensor in adapter(&bench).shapes() {
        let name = format!("grad_{}", tensor.field.to_uppercase());
        near(case, &name, &slope(&mut grads, &tensor)?, 1e-5)?;
    }
    Ok("output, gradients and merged weight are equal".into())
}
