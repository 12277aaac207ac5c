//! Hydra against reference values.

use lowrank_models::adapter::{AdapterConfig, GivenTensors};

use super::support::bench::common;
use super::support::case::{Case, Outcome};
use super::support::structures::unmerged;

pub fn run(case: &Case) -> Outcome {
    let (parallel, sequential) =
        case.choice("branches", &[("both", (true, true)), ("parallel", (true, false)), ("sequential", (false, true))])?;
    let config = AdapterConfig::new("hydra")
        .with_option("rank_parallel", if parallel { case.count("rank_parallel")? } else { 0 })
        .with_option("rank_sequential", if sequential { case.count("rank_sequential")? } else { 0 })
        .with_option("scale", case.number("scaling")?)
        .with_option("branch_bias", case.flag("adapter_bias")?);
    unmerged(case, &config, "exp.unmerged_w", 1e-4)?;
    common(case, &config, &GivenTensors::new())
}
