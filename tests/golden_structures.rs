//! One runner a structure: the configuration of its cases, and what they hold beyond what all do.

use lowrank_models::adapter::{AdapterConfig, GivenTensors, Scaling};

use super::adapters::{adapter, attached, common, given, near};
use super::case::{Case, Outcome, host};

/// Divisors of alpha by their names in cases.
const RULES: &[(&str, Scaling)] = &[("alpha/r", Scaling::Rank), ("alpha/sqrt(r)", Scaling::RootRank)];

pub fn block_lora(case: &Case) -> Outcome {
    let config = AdapterConfig::new("block-lora")
        .with_rank(case.count("rank")?)
        .with_alpha(case.number("alpha")?)
        .with_option("blocks", case.count("blocks")?);
    let config = AdapterConfig { scaling: Some(case.choice("scaling_rule", RULES)?), ..config };
    common(case, &config, &GivenTensors::new())
}

pub fn bone(case: &Case) -> Outcome {
    let mut config = AdapterConfig::new("bone").with_rank(case.count("rank")?).with_option("mode", case.word("mode")?);
    if !case.config["mini_r"].is_null() {
        config = config.with_option("mini_r", case.count("mini_r")?);
    }
    unmerged(case, &config, "exp.unmerged_w", 1e-5)?;
    common(case, &config, &GivenTensors::new())
}

pub fn hydra(case: &Case) -> Outcome {
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

/// The merged weight gives back the one before it, at `p.*`.
fn unmerged(case: &Case, config: &AdapterConfig, name: &str, share: f64) -> Result<(), String> {
    let bench = attached(case, config, given(case, &["p"])?)?;
    let merged = case.array("exp.merged_w")?.tensor::<2>().transpose();
    let back = adapter(&bench).structure().unmerged(merged).ok_or("the weight cannot be had back")?;
    near(case, if case.has(name) { name } else { "in.weight" }, &host(back.transpose()), share)
}
