//! SLTrain against reference values.

use burn::tensor::Tensor;
use lowrank_models::linear::LinearLayer;
use lowrank_models::linear::cola::ColaOptions;
use lowrank_models::linear::sltrain::{SlTrain, SlTrainOptions};
use lowrank_models::{LlamaConfig, Parameterization};

use super::support::case::{Case, Outcome, host};
use super::support::matrices::{index, near, rows, tracked, turned};
use super::support::trainer::Trainer;

pub fn run(case: &Case) -> Outcome {
    match (case.has("grad_output"), case.has("target"), case.has("delta")) {
        (true, _, _) => sltrain_gradients(case),
        (_, true, _) => sltrain_training(case),
        (_, _, true) => parameter_counts(case),
        _ => Err("holds neither gradients, steps nor counts".into()),
    }
}

fn sltrain_gradients(case: &Case) -> Outcome {
    let (a, b, values) = (turned(case, "A")?, turned(case, "B")?, tracked(case, "sparse_value")?);
    let scaling = if case.flag("trainable_scaling")? { Some(tracked(case, "scaling_raw")?) } else { None };
    let positions = index(case, "sparse_index")?;
    let (alpha, q) = (case.number("alpha")?, scaling.clone());
    let layer = SlTrain::from_parts(a.clone(), b.clone(), values.clone(), positions, alpha, q);
    near(&case.array("dense_weight")?, "dense_weight", host(dense(&layer)?.transpose()))?;
    let x = rows(case, "x")?.autodiff().require_grad();
    let bias = if case.flag("bias")? { Some(tracked(case, "bias")?) } else { None };
    let y = layer.forward(x.clone());
    let y = match &bias {
        Some(bias) => y + bias.clone().unsqueeze::<2>(),
        None => y,
    };
    near(&case.array("y")?, "y", host(y.clone().inner()))?;
    let mut grads = (y * rows(case, "grad_output")?.autodiff()).sum().backward();
    let mut matrix = |tensor: &Tensor<2>, name: &str, turn: bool| {
        let gradient = tensor.grad_remove(&mut grads).ok_or(format!("no {name}"))?;
        near(&case.array(name)?, name, host(if turn { gradient.transpose() } else { gradient }))
    };
    matrix(&x, "grad_x", false)?;
    matrix(&a, "grad_A", true)?;
    matrix(&b, "grad_B", true)?;
    for (tensor, name) in
        [(Some(&values), "grad_sparse_value"), (scaling.as_ref(), "grad_scaling_raw"), (bias.as_ref(), "grad_bias")]
    {
        if let Some(tensor) = tensor {
            let gradient = tensor.grad_remove(&mut grads).ok_or(format!("no {name}"))?;
            near(&case.array(name)?, name, host(gradient))?;
        }
    }
    Ok("output, dense weight and all gradients are equal".into())
}

fn sltrain_training(case: &Case) -> Outcome {
    let (mut a, mut b, mut values) = (turned(case, "A_0")?, turned(case, "B_0")?, tracked(case, "sparse_value_0")?);
    let (x, target, multipliers) = (case.array("x")?, case.array("target")?, case.array("lr_multiplier")?);
    let mut trainer = Trainer::new(case)?;
    let layer = |a: &Tensor<2>, b: &Tensor<2>, values: &Tensor<1>| -> Result<SlTrain, String> {
        let positions = index(case, "sparse_index")?;
        Ok(SlTrain::from_parts(a.clone(), b.clone(), values.clone(), positions, case.number("alpha")?, None))
    };
    let mut worst = 0f64;
    for step in 0..case.count("steps")? {
        let y = layer(&a, &b, &values)?.forward(x.at(step).tensor::<2>().autodiff());
        let loss = (y - target.at(step).tensor::<2>().autodiff()).square().mean();
        let ours = loss.clone().into_scalar::<f32>();
        let expected = case.array("loss")?.values[step];
        if (f64::from(ours) - expected).abs() > 1e-5 * expected {
            return Err(format!("loss at step {step} is {ours} instead of {expected}"));
        }
        let mut grads = loss.backward();
        let lr = case.number("lr")? * multipliers.values[step];
        let (da, db) = (a.grad_remove(&mut grads).ok_or("no grad_A")?, b.grad_remove(&mut grads).ok_or("no grad_B")?);
        let dv = values.grad_remove(&mut grads).ok_or("no grad_sparse_value")?;
        a = trainer.matrix(0, lr, a, da);
        b = trainer.matrix(1, lr, b, db);
        values = trainer.vector(lr, values, dv);
        let after = step + 1;
        for (name, ours) in [
            (format!("A_{after}"), host(a.clone().inner().transpose())),
            (format!("B_{after}"), host(b.clone().inner().transpose())),
            (format!("sparse_value_{after}"), host(values.clone().inner())),
        ] {
            worst = worst.max(case.array(&name)?.near(&name, &ours, 1e-6, 1e-5)?);
        }
    }
    near(&case.array("dense_weight_final")?, "dense_weight_final", host(dense(&layer(&a, &b, &values)?)?.transpose()))?;
    Ok(format!("parts within {worst:.1e} after all steps"))
}

/// Counts of the paper's models.
fn parameter_counts(case: &Case) -> Outcome {
    let (shapes, expected, deltas) =
        (case.array("config_d_ff_layers_rank")?, case.array("params_full_lowrank_sltrain_nnz")?, case.array("delta")?);
    for row in 0..shapes.shape[0] {
        let [hidden, inner, layers, rank] = shapes.at(row).i32()[..] else { return Err("no four numbers".into()) };
        let mut config = LlamaConfig::named("llama-60m", case.count("vocab")?).map_err(|error| error.to_string())?;
        (config.hidden_size, config.intermediate_size) = (hidden as usize, inner as usize);
        (config.num_hidden_layers, config.head_dim) = (layers as usize, hidden as usize / config.num_attention_heads);
        let full = config.parameters();
        let rank = rank as usize;
        config.parameterization = Parameterization::Cola(ColaOptions { rank, ..Default::default() });
        let low = config.parameters();
        // The case holds the nearest f32 to the paper's decimal.
        let density = format!("{}", deltas.values[row] as f32).parse().map_err(|_| "delta is no number")?;
        config.parameterization = Parameterization::SlTrain(SlTrainOptions { rank, density, ..Default::default() });
        let ours = [full, low, config.parameters(), config.positions()].map(|count| count as f64);
        if ours != expected.at(row).values[..] {
            return Err(format!("row {row} has {ours:?} instead of {:?}", expected.at(row).values));
        }
    }
    Ok("all counts are equal".into())
}

fn dense(layer: &SlTrain) -> Result<Tensor<2>, String> {
    layer.to_dense().ok_or("a layer has no dense weight".to_string())
}
