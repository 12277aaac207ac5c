//! Fira against reference values.

use lowrank_optim::{Granularity, Inner, ProjectedConfig, Residual};

use super::support::case::{Case, Outcome};
use super::support::projected::{PROJECTORS, Tolerance, adam, trajectory};

pub fn run(case: &Case) -> Outcome {
    let config = adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_projector(case.choice("projection", PROJECTORS)?)
        .with_update_proj_gap(case.count("update_proj_gap")?)
        .with_scale(case.number("alpha")?)
        .with_residual(case.choice("residual", &[("scaled", Residual::Scaled), ("pure", Residual::ScaledPure)])?)
        .with_granularity(
            case.choice("granularity", &[("channel", Granularity::Channel), ("matrix", Granularity::Matrix)])?,
        )
        .with_growth_limit(case.number("gamma")?)
        .with_inner(Inner::AdamLegacy)
        .with_decay_after(true);
    trajectory(case, &config, config.build(), Tolerance(2e-6, 1e-5))
}
