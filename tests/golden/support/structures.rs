//! Weights restored after a merge.

use lowrank_models::adapter::AdapterConfig;

use super::bench::{adapter, attached, given, near};
use super::case::{Case, host};

/// The merged weight gives back the one before it, at `p.*`.
pub fn unmerged(case: &Case, config: &AdapterConfig, name: &str, share: f64) -> Result<(), String> {
    let bench = attached(case, config, given(case, &["p"])?)?;
    let merged = case.array("exp.merged_w")?.tensor::<2>().transpose();
    let back = adapter(&bench).structure().unmerged(merged).ok_or("the weight cannot be had back")?;
    near(case, if case.has(name) { name } else { "in.weight" }, &host(back.transpose()), share)
}
