//! APOLLO against reference values.

use lowrank_optim::{Granularity, Inner, ProjectedConfig, ProjectorKind, Residual};

use super::support::case::{Case, Outcome};
use super::support::projected::{Tolerance, adam, given, trajectory};

pub fn run(case: &Case) -> Outcome {
    let config = adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_projector(case.choice("proj", &[("random", ProjectorKind::Gaussian), ("svd", ProjectorKind::Svd)])?)
        .with_update_proj_gap(case.count("update_proj_gap")?)
        .with_scale(case.number("scale")?)
        .with_scale_front(case.flag("scale_front")?)
        .with_residual(Residual::Gradient)
        .with_granularity(
            case.choice("scale_type", &[("channel", Granularity::Channel), ("tensor", Granularity::Matrix)])?,
        )
        .with_growth_limit(if case.flag("limiter")? { 1.01 } else { 0.0 })
        .with_inner(Inner::AdamLegacy)
        .with_decay_after(true);
    let optimizer = match config.projector {
        ProjectorKind::Gaussian => given(&config, case)?,
        _ => config.build(),
    };
    trajectory(case, &config, optimizer, Tolerance(2e-6, 1e-5))
}
