//! CoLA, LOST, LORO and plain low rank against reference values.

use burn::module::Param;
use lowrank_models::linear::LinearLayer;
use lowrank_models::linear::cola::Cola;
use lowrank_models::linear::lost::Lost;
use lowrank_models::linear::low_rank::LowRank;
use lowrank_optim::loro::{Factors, exact_step, lazy_step};

use super::support::case::{Case, Outcome, host};
use super::support::matrices::{index, near, rows, tracked, turned};
use super::support::trainer::Trainer;

pub fn run(case: &Case) -> Outcome {
    match () {
        () if case.has("dM") => loro(case),
        () if case.has("W_dense_init") => lost(case),
        () if case.has("low_rank_preactivation") => cola(case),
        () if case.has("y_0") => low_rank(case),
        () => Err("is of no known kind".into()),
    }
}

fn cola(case: &Case) -> Outcome {
    let (a, b) = (turned(case, "A")?, turned(case, "B")?);
    let layer = Cola { a: Param::from_tensor(a.clone()), b: Param::from_tensor(b.clone()), bias: None };
    let x = rows(case, "x")?.autodiff().require_grad();
    let y = layer.forward(x.clone());
    let y = match case.flag("bias")? {
        true => y + tracked(case, "bias")?.unsqueeze::<2>(),
        false => y,
    };
    near(&case.array("y")?, "y", host(y.clone().inner()))?;
    let mut grads = (y * rows(case, "grad_output")?.autodiff()).sum().backward();
    for (tensor, name, turn) in [(&x, "grad_x", false), (&a, "grad_A", true), (&b, "grad_B", true)] {
        let gradient = tensor.grad_remove(&mut grads).ok_or(format!("no {name}"))?;
        near(&case.array(name)?, name, host(if turn { gradient.transpose() } else { gradient }))?;
    }
    Ok("output and gradients are equal".into())
}

fn low_rank(case: &Case) -> Outcome {
    let (mut a, mut b) = (turned(case, "A_0")?, turned(case, "B_0")?);
    let (x, target) = (case.array("x")?, case.array("target")?);
    let mut trainer = Trainer::new(case)?;
    let mut worst = 0f64;
    for step in 0..case.count("steps")? {
        let layer = LowRank { a: Param::from_tensor(a.clone()), b: Param::from_tensor(b.clone()), bias: None };
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
