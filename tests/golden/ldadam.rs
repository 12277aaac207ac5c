//! LDAdam against reference values.

use lowrank_optim::{OnRenewal, ProjectFrom, ProjectedConfig, ProjectorKind, Residual, Side};

use super::support::case::{Case, Outcome};
use super::support::projected::{SIDES, Tolerance, adam, trajectory};

pub fn run(case: &Case) -> Outcome {
    let feedback = case.flag("error_feedback")?;
    let config = adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_update_proj_gap(1)
        .with_project_from(ProjectFrom::Momentum)
        .with_rho(case.number("rho")?)
        .with_projector(case.choice(
            "method",
            &[("power_iteration", ProjectorKind::Power), ("svd", ProjectorKind::Svd), ("dct", ProjectorKind::Dct)],
        )?)
        .with_on_renewal(OnRenewal::Transport)
        .with_residual(if feedback { Residual::Full } else { Residual::None })
        .with_error_of_momentum(feedback)
        .with_side(match case.choice("proj_type", SIDES)? {
            Side::Std => Side::StdLeft,
            side => side,
        });
    trajectory(case, &config, config.build(), Tolerance(1e-5, 1e-5))
}
