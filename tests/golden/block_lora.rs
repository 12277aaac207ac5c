//! Block-LoRA against reference values.

use lowrank_models::adapter::{AdapterConfig, GivenTensors, Scaling};

use super::support::bench::common;
use super::support::case::{Case, Outcome};

/// Divisors of alpha by their names in cases.
const RULES: &[(&str, Scaling)] = &[("alpha/r", Scaling::Rank), ("alpha/sqrt(r)", Scaling::RootRank)];

pub fn run(case: &Case) -> Outcome {
    let config = AdapterConfig::new("block-lora")
        .with_rank(case.count("rank")?)
        .with_alpha(case.number("alpha")?)
        .with_option("blocks", case.count("blocks")?);
    let config = AdapterConfig { scaling: Some(case.choice("scaling_rule", RULES)?), ..config };
    common(case, &config, &GivenTensors::new())
}
