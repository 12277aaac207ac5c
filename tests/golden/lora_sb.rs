//! LoRA-XS and its start LoRA-SB against reference values.

use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_models::Dense;
use lowrank_models::adapter::{AdapterConfig, Attach, BaseGradients};

use super::support::bench::{Bench, adapter, attached_to, fresh_on, gradient, near};
use super::support::case::{Case, Outcome, host};
use super::support::factors::{Names, bare, config, singular_values, tensors, training};

const CORE: Names = &[("core", "R")];

const FACTORS: Names = &[("a", "A"), ("b", "B")];

pub fn run(case: &Case) -> Outcome {
    match case.names() {
        names if names.iter().any(|name| name == "init_grads") => update_approximation(case),
        names if names.iter().any(|name| name == "R_0") => lora_xs(case),
        names if names.iter().any(|name| name == "optimal_grad_R") => optimal(case),
        _ => Err("is of no known kind".into()),
    }
}

/// The gradient of the square, `[rank, rank]` as the case holds it, of the first batch.
fn first_slope(case: &Case, bench: &Bench) -> Result<Vec<f32>, String> {
    let [x, target] = [case.array("x")?, case.array("target")?].map(|array| array.at(0).tensor::<2>().autodiff());
    let grads = (bench.output(x) - target).square().mean().backward();
    core_slope(bench, GradientsParams::from_grads(grads, bench))
}

fn core_slope(bench: &Bench, mut grads: GradientsParams) -> Result<Vec<f32>, String> {
    let tensors = adapter(bench).shapes();
    let core = tensors.iter().find(|tensor| tensor.field == "core").ok_or("no square")?;
    gradient(&mut grads, core)
}

fn with_start(case: &Case, config: &AdapterConfig) -> Result<Bench, String> {
    let mut given = tensors(case, CORE, "_0")?;
    given.extend(tensors(case, FACTORS, "")?);
    attached_to(bare(case)?, config, given)
}

/// `A^T A` or `B B^T` of the factor of a field, as the paper writes them.
fn projector(bench: &Bench, field: &str) -> Result<Vec<f32>, String> {
    let found = adapter(bench).tensors().into_iter().find(|(tensor, _)| tensor.field == field);
    let (_, data) = found.ok_or("no such factor")?;
    let factor = Tensor::<2>::from_data(data, &Default::default());
    let wide = if field == "a" { factor } else { factor.transpose() };
    Ok(host(wide.clone().transpose().matmul(wide)))
}

fn update_of(bench: &Bench) -> Vec<f32> {
    host(adapter(bench).structure().delta_weight(&bench.weight()).unwrap().inner().transpose())
}

fn update_approximation(case: &Case) -> Outcome {
    let config = AdapterConfig { init: "lora-sb".into(), ..config(case, "lora-xs")? }
        .with_option("init_step_size", case.number("init_step_size")?)
        .with_option("sign", case.flag("sign").unwrap_or(true));
    let [d_in, d_out] = [case.count("d_in")?, case.count("d_out")?];
    let grads = case.array("init_grads")?.tensor::<3>();
    let sum = host(grads.sum_dim(0).squeeze_dim::<2>(0).transpose());
    let start = |config: &AdapterConfig| {
        let gradients = BaseGradients::from([("layer".to_string(), sum.clone())]);
        let attach = Attach::new(config.clone()).with_gradients(gradients).factored();
        Ok::<_, String>(attach.to(Bench::new(bare(case)?)).map_err(|error| error.to_string())?.0)
    };
    let bench = start(&config)?;
    near(case, "initial_product", &update_of(&bench), 1e-5)?;
    near(case, "left_projector", &projector(&bench, "b")?, 1e-5)?;
    near(case, "right_projector", &projector(&bench, "a")?, 1e-5)?;
    // At full rank nothing of the first update is left out.
    let most = d_in.min(d_out);
    let whole = start(&AdapterConfig { rank: Some(most), alpha: None, ..config.clone() })?;
    near(case, "update_estimate", &update_of(&whole), 1e-5)?;
    let core = adapter(&whole).tensors().into_iter().find(|(tensor, _)| tensor.field == "core").ok_or("no square")?.1;
    let core: Vec<f32> = core.try_into_vec().map_err(|error| format!("{error:?}"))?;
    let values: Vec<f32> = core.iter().step_by(most + 1).copied().collect();
    near(case, "singular_values", &values, 1e-5)?;

    let given = with_start(case, &config)?;
    let gradient = first_slope(case, &given)?;
    near(case, "grad_R_0", &gradient, 1e-5)?;
    near(case, "full_grad_0", &full_gradient(case, &given)?, 1e-5)?;
    near(case, "equivalent_grad_0", &spread(case, &config, gradient)?, 1e-5)?;
    training(case, &config, CORE, FACTORS)
}

/// The gradient of the layer's whole weight on the first batch, from one of its weight merged.
fn full_gradient(case: &Case, bench: &Bench) -> Result<Vec<f32>, String> {
    let weight = bench.weight().autodiff().require_grad();
    let [x, target] = [case.array("x")?, case.array("target")?].map(|array| array.at(0).tensor::<2>().autodiff());
    let mut grads = (x.matmul(weight.clone()) - target).square().mean().backward();
    Ok(host(weight.grad_remove(&mut grads).ok_or("the weight has no gradient")?.transpose()))
}

/// The update of a layer whose square is this one.
fn spread(case: &Case, config: &AdapterConfig, square: Vec<f32>) -> Result<Vec<f32>, String> {
    let rank = case.count("rank")?;
    let mut given = tensors(case, FACTORS, "")?;
    given.insert("core".into(), burn::tensor::TensorData::new(square, [rank, rank]));
    Ok(update_of(&attached_to(still(case)?, config, given)?))
}

/// A layer of zeros.
fn still(case: &Case) -> Result<Dense, String> {
    let shape = [case.count("d_in")?, case.count("d_out")?];
    Ok(Dense::from_parts(Tensor::zeros(shape, &Default::default()).autodiff(), None))
}

fn lora_xs(case: &Case) -> Outcome {
    let config = config(case, "lora-xs")?;
    let bench = fresh_on(bare(case)?, &config)?;
    near(case, "A_gram", &projector(&bench, "a")?, 1e-5)?;
    near(case, "B_gram", &projector(&bench, "b")?, 1e-5)?;
    singular_values(case, &case.array("W")?.tensor::<2>())?;
    near(case, "grad_R_0", &first_slope(case, &with_start(case, &config)?)?, 1e-5)?;
    training(case, &config, CORE, FACTORS)
}

fn optimal(case: &Case) -> Outcome {
    let rank = case.count("rank")?;
    let config = AdapterConfig::new("lora-xs").with_rank(rank).with_alpha(case.number("scale")? * rank as f64);
    let gradient = |config: &AdapterConfig| {
        let mut given = tensors(case, FACTORS, "")?;
        given.insert("core".into(), burn::tensor::TensorData::zeros::<f32, _>([rank, rank]));
        let bench = attached_to(still(case)?, config, given)?;
        // With the identity as input the output is the weight.
        let y = bench.output(Tensor::<2>::eye(case.count("d_in")?, &Default::default()).autodiff());
        let loss = (y * case.array("full_grad")?.tensor::<2>().transpose().autodiff()).sum();
        core_slope(&bench, GradientsParams::from_grads(loss.backward(), &bench))
    };
    near(case, "grad_R", &gradient(&config)?, 1e-5)?;
    let optimal = gradient(&config.clone().with_option("optimal_scaling", true))?;
    near(case, "optimal_grad_R", &optimal, 1e-5)?;
    near(case, "equivalent_grad", &spread(case, &config, optimal)?, 1e-5)?;
    Ok("plain and corrected gradients are equal".into())
}
