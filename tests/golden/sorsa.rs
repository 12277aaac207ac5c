//! SORSA against reference values.

use burn::tensor::{Tensor, TensorData};
use lowrank_models::adapter::AdapterConfig;

use super::support::bench::{attached, common, given, near, regulariser, training};
use super::support::case::{Case, Outcome};
use super::support::decompositions::{kept, matrix, remainder, starts_at_base, tensor};

pub fn run(case: &Case) -> Outcome {
    let (rank, gamma) = (case.count("rank")?, case.number("gamma")?);
    let mut config = AdapterConfig::new("sorsa").with_rank(rank).with_option("gamma", gamma);
    config.alpha = case.config["alpha"].as_f64();
    let scale = config.alpha.map_or(1.0, |alpha| alpha / rank as f64) as f32;
    let sigma = case.array("exp.svd_s")?.f32();
    let valued = matrix(case, "exp.svd_b")? * case.array("exp.svd_s")?.tensor::<1>().unsqueeze();
    let mut tensors = kept(case, &[("origin.a", "exp.svd_a")], Vec::new())?;
    tensors.insert("origin.b".into(), valued.clone().into_data());
    let scaled: Vec<f32> = sigma.iter().map(|value| value * scale).collect();
    remainder(case, "exp.svd_b", &scaled, "exp.svd_a")?;
    let outcome = common(case, &config, &tensors);

    tensors.extend(given(case, &["p"])?);
    regulariser(case, &attached(case, &config.clone().with_option("gamma", 1.0), tensors)?, 1.0)?;

    let start = starts_at_base(case, &config)?;
    near(case, "exp.svd_s", &tensor(&start, "s")?, 2e-5)?;
    let part = |b: Tensor<2>, a: Tensor<2>| b.matmul(a);
    let expected = part(valued, matrix(case, "exp.svd_a")?);
    let d_out = expected.dims()[0];
    let ours = |field: &str, shape: [usize; 2]| -> Result<Tensor<2>, String> {
        Ok(Tensor::from_data(TensorData::new(tensor(&start, field)?, shape), &Default::default()))
    };
    let d_in = expected.dims()[1];
    let s = Tensor::<1>::from_data(tensor(&start, "s")?.as_slice(), &Default::default());
    let difference = part(ours("b", [d_out, rank])? * s.unsqueeze(), ours("a", [rank, d_in])?) - expected;
    if difference.abs().max().into_scalar::<f32>() as f64 > 2e-5 * case.array("in.weight")?.largest() {
        return Err("the principal part of our own decomposition is another".into());
    }
    // From the decomposition itself, and without the pull, training does not depend on signs.
    let begins_there = ["a", "s", "b"].iter().all(|name| {
        let (init, svd) = (case.array(&format!("init.{name}")), case.array(&format!("exp.svd_{name}")));
        init.is_ok_and(|init| svd.is_ok_and(|svd| init.values == svd.values))
    });
    if begins_there && gamma == 0.0 {
        training(case, start, false)?;
    }
    outcome
}
