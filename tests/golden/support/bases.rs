//! Structures whose factors follow from a seed.

use lowrank_models::adapter::{AdapterConfig, GivenTensors};

use super::bench::{Bench, attached, given};
use super::case::Case;

/// The adapter of a case at `p.*`.
pub fn bench(case: &Case, config: &AdapterConfig, kept: &GivenTensors) -> Result<Bench, String> {
    let mut tensors = given(case, &["p"])?;
    tensors.extend(kept.clone());
    attached(case, config, tensors)
}

pub fn wrong(name: &str) -> String {
    format!("the adapter is not {name}")
}

/// A list of whole numbers of the configuration.
pub fn counts(case: &Case, key: &str) -> Result<serde_json::Value, String> {
    match &case.config[key] {
        list @ serde_json::Value::Array(_) => Ok(list.clone()),
        other => Err(format!("configuration: {key} is {other} instead of a list")),
    }
}
