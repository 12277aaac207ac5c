//! TeRA against reference values.

use burn::tensor::TensorData;
use lowrank_models::adapter::AdapterConfig;

use super::support::bases::counts;
use super::support::bench::{common, given};
use super::support::case::{Case, Outcome};

pub fn run(case: &Case) -> Outcome {
    let config = AdapterConfig::new("tera")
        .with_option("out_modes", counts(case, "out_dims")?)
        .with_option("in_modes", counts(case, "in_dims")?)
        .with_option("ranks", counts(case, "ranks")?)
        .with_option("scale", case.number("scaling")?)
        .with_option("zero_mode", case.count("zero_mode")?);
    let mut kept = given(case, &["frozen"])?;
    // The core as a matrix between the ranks of the output and those of the input.
    let core = case.array("frozen.core")?;
    let outputs = case.config["out_dims"].as_array().map_or(0, Vec::len);
    let (rows, columns) = core.shape.split_at(outputs);
    let shape = [rows.iter().product::<usize>(), columns.iter().product()];
    kept.insert("core".into(), TensorData::new(core.f32(), shape));
    common(case, &config, &kept)
}
