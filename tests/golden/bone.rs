//! Bone against reference values.

use lowrank_models::adapter::{AdapterConfig, GivenTensors};

use super::support::bench::common;
use super::support::case::{Case, Outcome};
use super::support::structures::unmerged;

pub fn run(case: &Case) -> Outcome {
    let mut config = AdapterConfig::new("bone").with_rank(case.count("rank")?).with_option("mode", case.word("mode")?);
    if !case.config["mini_r"].is_null() {
        config = config.with_option("mini_r", case.count("mini_r")?);
    }
    unmerged(case, &config, "exp.unmerged_w", 1e-5)?;
    common(case, &config, &GivenTensors::new())
}
