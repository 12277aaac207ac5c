//! SLTrain and its competitors against the authors' code: outputs, gradients, training steps, counts.

use burn::module::Param;
use burn::optim::Optimizer;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowrank_models::linear::{Cola, Lost, LowRank, SlTrain};
use lowrank_models::{LlamaConfig, Parameterization};
use lowrank_optim::loro::{Factors, exact_step, lazy_step};
use lowrank_optim::{AdamW, AdamWConfig};

use super::case::{Array, Case, Outcome, host};

pub fn sltrain(case: &Case) -> Outcome {
    match (case.has("grad_output"), case.has("target"), case.has("delta")) {
        (true, _, _) => sltrain_gradients(case),
        (_, true, _) => sltrain_training(case),
        (_, _, true) => parameter_counts(case),
        _ => Err("holds neither gradients, steps nor counts".into()),
    }
}

pub fn others(case: &Case) -> Outcome {
    match () {
        () if case.has("dM") => loro(case),
        () if case.has("W_dense_init") => lost(case),
        () if case.has("low_rank_preactivation") => cola(case),
        () if case.has("y_0") => low_rank(case),
        () => Err("is of no known kind".into()),
    }
}

/// Stored `[d_out, d_in]` or `[d_out, rank]` in the case, transposed in a layer.
fn turned(case: &Case, name: &str) -> Result<Tensor<2>, String> {
    Ok(case.array(name)?.tensor::<2>().transpose().autodiff().require_grad())
}

fn tracked(case: &Case, name: &str) -> Result<Tensor<1>, String> {
    Ok(case.array(name)?.tensor::<1>().autodiff().require_grad())
}

fn rows(case: &Case, name: &str) -> Result<Tensor<2>, String> {
    let array = case.array(name)?;
    let width = *array.shape.last().ok_or("a scalar has no rows")?;
    let count = array.values.len() / width;
    Ok(Tensor::from_data(TensorData::new(array.f32(), [count, width]), &Device::default()))
}

fn index(case: &Case, name: &str) -> Result<Tensor<1, Int>, String> {
    let positions = case.array(name)?.i32();
    let count = positions.len();
    Ok(Tensor::from_data(TensorData::new(positions, [count]), (&Device::default(), DType::I32)))
}

/// Within 1e-5 of the largest value.
fn near(expected: &Array, what: &str, ours: Vec<f32>) -> Result<(), String> {
    expected.near(what, &ours, 1e-5 * expected.largest().max(1e-3), 1e-5).map(|_| ())
}

fn sltrain_gradients(case: &Case) -> Outcome {
    let (a, b, values) = (turned(case, "A")?, turned(case, "B")?, tracked(case, "sparse_value")?);
    let scaling = if case.flag("trainable_scaling")? { Some(tracked(case, "scaling_raw")?) } else { None };
    let positions = index(case, "sparse_index")?;
    let (alpha, q) = (case.number("alpha")?, scaling.clone());
    let layer = SlTrain::from_parts(a.clone(), b.clone(), values.clone(), positions, alpha, q);
    near(&case.array("dense_weight")?, "dense_weight", host(layer.to_dense().transpose()))?;
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
        let slope = tensor.grad_remove(&mut grads).ok_or(format!("no {name}"))?;
        near(&case.array(name)?, name, host(if turn { slope.transpose() } else { slope }))
    };
    matrix(&x, "grad_x", false)?;
    matrix(&a, "grad_A", true)?;
    matrix(&b, "grad_B", true)?;
    for (tensor, name) in
        [(Some(&values), "grad_sparse_value"), (scaling.as_ref(), "grad_scaling_raw"), (bias.as_ref(), "grad_bias")]
    {
        if let Some(tensor) = tensor {
            let slope = tensor.grad_remove(&mut grads).ok_or(format!("no {name}"))?;
            near(&case.array(name)?, name, host(slope))?;
        }
    }
    Ok("output, dense weight and all gradients are equal".into())
}

/// AdamW on several tensors of a case.
struct Trainer {
    optimizer: AdamW,
    two: Vec<Option<lowrank_optim::AdamWState<2>>>,
    one: Option<lowrank_optim::AdamWState<1>>,
}

impl Trainer {
    fn new(case: &Case) -> Result<Self, String> {
        let betas = case.config["betas"].as_array().ok_or("configuration: betas")?;
        let beta = |place: usize| betas[place].as_f64().ok_or("configuration: betas");
        let optimizer = AdamWConfig::new()
            .with_beta_1(beta(0)?)
            .with_beta_2(beta(1)?)
            .with_epsilon(case.number("eps")?)
            .with_weight_decay(case.number("weight_decay")?)
            .build();
        Ok(Self { optimizer, two: vec![None, None], one: None })
    }

    fn matrix(&mut self, place: usize, lr: f64, w: Tensor<2>, g: Tensor<2>) -> Tensor<2> {
        let (w, state) = self.optimizer.step(lr, w.inner(), g, self.two[place].take());
        self.two[place] = state;
        w.autodiff().require_grad()
    }

    fn vector(&mut self, lr: f64, w: Tensor<1>, g: Tensor<1>) -> Tensor<1> {
        let (w, state) = self.optimizer.step(lr, w.inner(), g, self.one.take());
        self.one = state;
        w.autodiff().require_grad()
    }
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
    near(
        &case.array("dense_weight_final")?,
        "dense_weight_final",
        host(layer(&a, &b, &values)?.to_dense().transpose()),
    )?;
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
        config.parameterization = Parameterization::Cola { rank, keep_gate: true };
        let low = config.parameters();
        // The case holds the nearest f32 to the paper's decimal.
        let density = format!("{}", deltas.values[row] as f32).parse().map_err(|_| "delta is no number")?;
        config.parameterization = Parameterization::SlTrain { rank, alpha: 1.0, density, trained_scale: false };
        let ours = [full, low, config.parameters(), config.positions()].map(|count| count as f64);
        if ours != expected.at(row).values[..] {
            return Err(format!("row {row} has {ours:?} instead of {:?}", expected.at(row).values));
        }
    }
    Ok("all counts are equal".into())
}

fn cola(case: &Case) -> Outcome {
    let (a, b) = (turned(case, "A")?, turned(case, "B")?);
    let layer = Cola { a: Param::from_tensor(a.clone()), b: Param::from_tensor(b.clone()) };
    let x = rows(case, "x")?.autodiff().require_grad();
    let y = layer.forward(x.clone());
    let y = match case.flag("bias")? {
        true => y + tracked(case, "bias")?.unsqueeze::<2>(),
        false => y,
    };
    near(&case.array("y")?, "y", host(y.clone().inner()))?;
    let mut grads = (y * rows(case, "grad_output")?.autodiff()).sum().backward();
    for (tensor, name, turn) in [(&x, "grad_x", false), (&a, "grad_A", true), (&b, "grad_B", true)] {
        let slope = tensor.grad_remove(&mut grads).ok_or(format!("no {name}"))?;
        near(&case.array(name)?, name, host(if turn { slope.transpose() } else { slope }))?;
    }
    Ok("output and gradients are equal".into())
}

fn low_rank(case: &Case) -> Outcome {
    let (mut a, mut b) = (turned(case, "A_0")?, turned(case, "B_0")?);
    let (x, target) = (case.array("x")?, case.array("target")?);
    let mut trainer = Trainer::new(case)?;
    let mut worst = 0f64;
    for step in 0..case.count("steps")? {
        let layer = LowRank { a: Param::from_tensor(a.clone()), b: Param::from_tensor(b.clone()) };
        let y = layer.forward(x.at(step).tensor::<2>().autodiff());
        if step == 0 {
            near(&case.array("y_0")?, "y_0", host(y.clone().inner()))?;
        }
        let loss = (y - target.at(step).tensor::<2>().autodiff()).square().mean();
        let mut grads = loss.backward();
        let (da, db) = (a.grad_remove(&mut grads).ok_or("no grad_A")?, b.grad_remove(&mut grads).ok_or("no grad_B")?);
        if step == 0 {
            near(&case.array("grad_A_0")?, "grad_A_0", host(da.clone().transpose()))?;
            near(&case.array("grad_B_0")?, "grad_B_0", host(db.clone().transpose()))?;
        }
        let lr = case.number("lr")?;
        a = trainer.matrix(0, lr, a, da);
        b = trainer.matrix(1, lr, b, db);
        for (tensor, name) in [(&a, format!("A_{}", step + 1)), (&b, format!("B_{}", step + 1))] {
            let ours = host(tensor.clone().inner().transpose());
            worst = worst.max(case.array(&name)?.near(&name, &ours, 2e-6, 1e-5)?);
        }
    }
    Ok(format!("factors within {worst:.1e} after all steps"))
}

fn loro(case: &Case) -> Outcome {
    let tensor = |name: &str| Ok::<_, String>(case.array(name)?.tensor::<2>());
    let factors = Factors { m: tensor("M")?, n: tensor("N")? };
    let directions = Factors { m: tensor("dM")?, n: tensor("dN")? };
    let exact = exact_step(&factors, &directions, case.number("lr")?).map_err(|error| error.to_string())?;
    let dense = exact.m.matmul(exact.n.transpose());
    near(&case.array("W_after_exact_step")?, "W_after_exact_step", host(dense))?;
    let lazy = lazy_step(factors, directions, case.number("lr")?, case.number("lr_scaler")?);
    near(&case.array("M_after_lazy_step")?, "M_after_lazy_step", host(lazy.m))?;
    near(&case.array("N_after_lazy_step")?, "N_after_lazy_step", host(lazy.n))?;
    Ok("both steps are equal".into())
}

fn lost(case: &Case) -> Outcome {
    let dense = case.array("W_dense_init")?;
    let (d_out, d_in) = (dense.shape[0], dense.shape[1]);
    let stored = dense.tensor::<2>().transpose();
    let (a, b) = (turned(case, "A")?.inner(), turned(case, "B")?.inner());
    let count = case.count("channels")?;
    let start = Lost::start(&host(stored.clone()), host(a.clone()), host(b.clone()), [d_in, d_out], count);
    near(&case.array("residual_column_norms")?, "residual_column_norms", start.norms)?;
    if start.channels != case.array("channel_index")?.i32() {
        return Err(format!("channels are {:?}", start.channels));
    }
    let channels = index(case, "channel_index")?;
    let sparse = stored.select(0, channels.clone());
    near(&case.array("sparse_weight")?, "sparse_weight", host(sparse.clone().transpose()))?;
    let layer = Lost::from_parts(a, b, sparse, channels, case.number("gamma")?);
    near(&case.array("y")?, "y", host(layer.forward(rows(case, "x")?)))?;
    Ok("channels and output are equal".into())
}
