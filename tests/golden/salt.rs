//! SALT against reference values.

use lowrank_models::adapter::AdapterConfig;

use super::support::bench::{attached, common, fresh, given, near, regulariser};
use super::support::case::{Case, Outcome, host};
use super::support::decompositions::{kept, matrix, starts_at_base, tensor};

pub fn run(case: &Case) -> Outcome {
    let relu = match case.config["relu"].as_bool() {
        Some(true) => "matrix",
        Some(false) => "none",
        None => case.word("relu")?,
    };
    let config = AdapterConfig::new("salt")
        .with_rank(case.count("rank")?)
        .with_option("top_k", case.count("top_k")?)
        .with_option("relu", relu)
        .with_option("reg_multiplier", case.number("reg_weight")?);
    let init = case.choice("init", &[("zero_y", "default"), ("small_random", "small_random")])?;
    let config = AdapterConfig { init: init.into(), ..config };
    let frozen = kept(case, &[("u", "frozen.u"), ("s", "frozen.s"), ("vt", "frozen.vt")], Vec::new())?;
    let outcome = common(case, &config, &frozen);

    let with = |key: &str, value: serde_json::Value| {
        let mut tensors = frozen.clone();
        tensors.extend(given(case, &["p"])?);
        attached(case, &config.clone().with_option(key, value), tensors)
    };
    regulariser(case, &with("reg_multiplier", 1.0.into())?, 1.0)?;
    let (u, vt) = (matrix(case, "frozen.u")?, matrix(case, "frozen.vt")?);
    for (name, relu) in [("exp.core_before_relu", "none"), ("exp.core", relu)] {
        let merged = with("relu", relu.into())?.weight().transpose();
        near(case, name, &host(u.clone().transpose().matmul(merged).matmul(vt.clone().transpose())), 1e-5)?;
    }
    let start = if init == "default" { starts_at_base(case, &config)? } else { fresh(case, &config)? };
    near(case, "frozen.s", &tensor(&start, "s")?, 2e-5)?;
    outcome
}
