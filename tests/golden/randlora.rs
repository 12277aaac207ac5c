//! RandLoRA against reference values.

use lowrank_models::adapter::{AdapterConfig, RandLora};

use super::support::bench::{common, given, near};
use super::support::case::{Case, Outcome};

pub fn run(case: &Case) -> Outcome {
    let mut config = AdapterConfig::new("randlora")
        .with_rank(case.count("rank")?)
        .with_alpha(case.number("alpha")?)
        .with_option("sqrt_n_scaling", case.flag("sqrt_n_scaling")?);
    let mut kept = given(case, &["frozen"])?;
    if let Some(s) = case.config["sparse_s"].as_f64() {
        config = config.with_option(if s == 3.0 { "sparse" } else { "very_sparse" }, true);
        for (draws, basis) in [("uniform_a", "frozen.basis_a"), ("uniform_b", "frozen.basis_b")] {
            if let Some(draws) = kept.remove(draws) {
                let draws: Vec<f32> = draws.try_into_vec().map_err(|error| format!("{basis}: {error:?}"))?;
                near(case, basis, &RandLora::ternary(&draws, s), 1e-5)?;
            }
        }
    }
    common(case, &config, &kept)
}
