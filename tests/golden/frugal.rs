//! FRUGAL against reference values.

use burn::optim::Optimizer;
use std::sync::Mutex;

use lowrank_optim::{BlockOrder, MatrixId, OnRenewal, ProjectedConfig, ProjectorKind, Residual, Subspace};

use super::support::case::{Case, Outcome, host};
use super::support::projected::{Given, PROJECTORS, Tolerance, adam, given, trajectory};

pub fn run(case: &Case) -> Outcome {
    let rank = if case.config["rank"].is_null() { 0 } else { case.count("rank")? };
    let config =
        adam(case, ProjectedConfig::new(rank))?
            .with_density(if rank == 0 { case.number("density")? } else { 0.0 })
            .with_projector(case.choice("projection", PROJECTORS)?)
            .with_update_proj_gap(case.count("update_gap")?)
            .with_on_renewal(if case.flag("reset_statistics")? { OnRenewal::Reset } else { OnRenewal::Keep })
            .with_residual(case.choice(
                "inactive_rule",
                &[("sign_sgd", Residual::Sign), ("sgd", Residual::Sgd), ("no", Residual::None)],
            )?)
            .with_inactive_lr_scale(case.number("inactive_lr_scale")?)
            .with_proj_lr_scale(case.number("proj_lr_scale")?);
    if config.projector == ProjectorKind::Block {
        return blocks(case, config);
    }
    let optimizer = match config.projector {
        _ if case.has("selected") => given(&config, case)?,
        ProjectorKind::Random | ProjectorKind::Randperm => given(&config, case)?,
        _ => config.build(),
    };
    trajectory(case, &config, optimizer, Tolerance(1e-6, 1e-5))
}

/// Several matrices of which some are active.
fn blocks(case: &Case, config: ProjectedConfig) -> Outcome {
    let orders = [
        ("descending", BlockOrder::Descending),
        ("ascending", BlockOrder::Ascending),
        ("random", BlockOrder::Random),
        ("mirror", BlockOrder::Mirror),
    ];
    let config = config.with_block_order(case.choice("block_order", &orders)?);
    let (grads, rates, w0) = (case.array("grads")?, case.array("lr")?, case.array("w0")?);
    let (weights, active) = (case.array("w")?, case.array("active")?);
    let count = w0.shape[0];
    let mut worst = 0f64;
    for number in 0..count {
        let place = MatrixId { key: number as u64, number, count };
        let optimizer = match config.block_order {
            BlockOrder::Random => {
                let subspaces = (0..grads.shape[0])
                    .step_by(config.update_proj_gap)
                    .map(|step| if active.at(step).values[number] > 0.0 { Subspace::Whole } else { Subspace::Nothing });
                let given = Given { subspaces: Mutex::new(subspaces.collect()) };
                config.build_with(given).map_err(|error| error.to_string())?
            }
            _ => config.build(),
        };
        let optimizer = optimizer.at(place);
        let (mut w, mut state) = (w0.at(number).tensor::<2>(), None);
        for step in 0..grads.shape[0] {
            (w, state) = optimizer.step(rates.values[step], w, grads.at(step).at(number).tensor(), state);
            let name = format!("w of matrix {number} at step {}", step + 1);
            worst = worst.max(weights.at(step).at(number).near(&name, &host(w.clone()), 1e-6, 1e-5)?);
            let matrix = state.as_ref().and_then(|state| state.matrix.as_ref()).ok_or("no state is kept")?;
            let ours = matches!(matrix.subspace, Some(Subspace::Whole));
            if ours != (active.at(step).values[number] > 0.0) || ours != matrix.moment_1.is_some() {
                return Err(format!("matrix {number} at step {} is active: {ours}", step + 1));
            }
        }
    }
    Ok(format!("weights of {count} matrices within {worst:.1e}"))
}
