//! Trion against reference values.

use lowrank_optim::{DctBasis, TrionConfig};

use super::support::case::{Case, Outcome, host};
use super::support::momentum::{COEFFICIENTS, SCALINGS, near_largest, steps};

pub fn run(case: &Case) -> Outcome {
    let mut remark = String::new();
    for fft in [lowrank_optim::Transform::Matmul, lowrank_optim::Transform::Fft] {
        let config = TrionConfig::new(case.count("rank")?)
            .with_momentum(case.number("mu")?)
            .with_basis(case.choice("basis", &[("dct3", DctBasis::Dct3), ("dct2", DctBasis::Dct2)])?)
            .with_transform(fft)
            .with_coefficients(case.choice("ns", COEFFICIENTS)?)
            .with_scaling(case.choice("scaling", SCALINGS)?)
            .with_rows_are_outputs(true)
            .with_weight_decay(case.number("weight_decay")?);
        let rule = config.build().rule().clone();
        // The momentum shows which columns were taken: these alone have decayed.
        remark = steps(case, &rule, |state, step| {
            let momentum = case.array("momentum")?.at(step);
            near_largest(&momentum, "momentum", host(state.momentum.clone()))
        })?;
    }
    Ok(remark)
}
