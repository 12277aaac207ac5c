//! WaRA against reference values.

use burn::tensor::Device;
use lowrank_models::adapter::{AdapterConfig, GivenTensors, Wavelet};

use super::support::bench::{common, near};
use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    let config = AdapterConfig::new("wara")
        .with_rank(case.count("rank")?)
        .with_alpha(case.number("alpha")?)
        .with_option("wavelet", case.word("wavelet")?)
        .with_option("levels", case.count("levels")?);
    case.choice("boundary", &[("periodic", ())])?;
    let wavelet = case.choice("wavelet", &[("haar", Wavelet::Haar), ("db2", Wavelet::Db2)])?;
    for (name, side) in [("exp.analysis_in", "d_in"), ("exp.analysis_out", "d_out")] {
        near(case, name, &host(wavelet.analysis(case.count(side)?, &Device::default())), 1e-5)?;
    }
    common(case, &config, &GivenTensors::new())
}
