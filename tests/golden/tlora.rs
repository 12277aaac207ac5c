//! T-LoRA against reference values.

use burn::optim::GradientsParams;
use lowrank_models::adapter::{AdapterConfig, GivenTensors, PenaltyAt, Regulariser, TLora, penalty};

use super::support::bases::{bench, counts, wrong};
use super::support::bench::{adapter, common, gradients, near};
use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    let (rank, residual) = (case.count("residual_rank")?, case.word("residual")?);
    let regulariser = case.word("regulariser")?;
    let config = AdapterConfig::new("tlora")
        .with_rank(rank)
        .with_option("out_dims", counts(case, "out_dims")?)
        .with_option("in_dims", counts(case, "in_dims")?)
        .with_option("transform_rank", case.count("transform_rank")?)
        .with_option("residual", residual)
        .with_option("regulariser", regulariser)
        .with_option("reg_weight", case.number("reg_weight")?);
    let config = match residual {
        "lora" => config.with_alpha(case.number("residual_scaling")? * rank as f64),
        _ => config,
    };
    // The penalty itself, also where training is without.
    let weighted = bench(case, &config.clone().with_option("reg_weight", 1.0), &GivenTensors::new())?;
    let adapter = adapter(&weighted);
    let tlora = adapter.structure.downcast_ref::<TLora>().ok_or_else(|| wrong("tlora"))?;
    near(case, "exp.transform", &host(tlora.transform().inner()), 1e-5)?;
    let [a, b] = tlora.residual();
    near(case, "exp.residual", &host(a.matmul(b).inner().transpose()), 1e-5)?;
    for (name, which) in [("exp.reg_identity", Regulariser::Identity), ("exp.reg_orthogonal", Regulariser::Orthogonal)]
    {
        near(case, name, &host(tlora.distance(which).inner()), 1e-5)?;
    }
    if regulariser != "none" {
        let sum = penalty(&weighted, PenaltyAt::Loss).ok_or("the structure has no penalty")?;
        near(case, "exp.reg", &host(sum.clone().inner()), 1e-5)?;
        gradients(case, &weighted, GradientsParams::from_grads(sum.backward(), &weighted), "exp.reg_grad")?;
    }
    common(case, &config, &GivenTensors::new())
}
