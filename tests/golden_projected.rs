//! Projected optimizers against the authors' code: weights, moments, subspace and limiter after every step.

use std::sync::Mutex;

use burn::optim::Optimizer;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowrank_optim::{
    BlockOrder, ByMatrix, ByMatrixState, DctBasis, Granularity, Inner, MomentType, Norm, Place, Projected,
    ProjectedConfig, ProjectedState, Projector, ProjectorKind, RenewAt, Renewal, Rest, Side, States, Subspace, Target,
};

use super::case::{Array, Case, Outcome, host};

/// How near values have to be: absolute and relative.
#[derive(Clone, Copy)]
pub struct Tolerance(pub f64, pub f64);

pub fn galore(case: &Case) -> Outcome {
    if case.has("cosine") {
        return lazy_gap(case);
    }
    if case.has("codes") {
        return groups(case);
    }
    let eight = case.word("states")? == "8bit";
    let side = case.choice("proj_type", SIDES)?;
    let config = adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_side(side)
        .with_update_proj_gap(case.count("update_proj_gap")?)
        .with_scale(case.number("scale")?)
        .with_inner(Inner::AdamLegacy)
        .with_decay_after(true)
        .with_moments(if eight { MomentType::EightBit } else { MomentType::F32 })
        .with_min_8bit_size(0);
    let tolerance = if eight { Tolerance(1e-4, 1e-4) } else { Tolerance(2e-6, 1e-5) };
    trajectory(case, &config, config.build(), tolerance)
}

pub fn fira(case: &Case) -> Outcome {
    let config = adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_projector(case.choice("projection", PROJECTORS)?)
        .with_update_proj_gap(case.count("update_proj_gap")?)
        .with_scale(case.number("alpha")?)
        .with_rest(case.choice("residual", &[("scaled", Rest::Scaled), ("pure", Rest::ScaledPure)])?)
        .with_granularity(
            case.choice("granularity", &[("channel", Granularity::Channel), ("matrix", Granularity::Matrix)])?,
        )
        .with_growth_limit(case.number("gamma")?)
        .with_inner(Inner::AdamLegacy)
        .with_decay_after(true);
    trajectory(case, &config, config.build(), Tolerance(2e-6, 1e-5))
}

pub fn apollo(case: &Case) -> Outcome {
    let config = adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_projector(case.choice("proj", &[("random", ProjectorKind::Gaussian), ("svd", ProjectorKind::Svd)])?)
        .with_update_proj_gap(case.count("update_proj_gap")?)
        .with_scale(case.number("scale")?)
        .with_scale_front(case.flag("scale_front")?)
        .with_rest(Rest::Gradient)
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

pub fn frugal(case: &Case) -> Outcome {
    let rank = if case.config["rank"].is_null() { 0 } else { case.count("rank")? };
    let config = adam(case, ProjectedConfig::new(rank))?
        .with_density(if rank == 0 { case.number("density")? } else { 0.0 })
        .with_projector(case.choice("projection", PROJECTORS)?)
        .with_update_proj_gap(case.count("update_gap")?)
        .with_states(if case.flag("reset_statistics")? { States::Reset } else { States::Keep })
        .with_rest(case.choice("inactive_rule", &[("sign_sgd", Rest::Sign), ("sgd", Rest::Sgd), ("no", Rest::None)])?)
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

pub fn ldadam(case: &Case) -> Outcome {
    let feedback = case.flag("error_feedback")?;
    let config = adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_update_proj_gap(1)
        .with_target(Target::Momentum)
        .with_rho(case.number("rho")?)
        .with_projector(case.choice(
            "method",
            &[("power_iteration", ProjectorKind::Power), ("svd", ProjectorKind::Svd), ("dct", ProjectorKind::Dct)],
        )?)
        .with_states(States::Transport)
        .with_rest(if feedback { Rest::Full } else { Rest::None })
        .with_error_of_momentum(feedback)
        .with_side(match case.choice("proj_type", SIDES)? {
            Side::Std => Side::StdLeft,
            side => side,
        });
    trajectory(case, &config, config.build(), Tolerance(1e-5, 1e-5))
}

pub fn dct_adamw(case: &Case) -> Result<ProjectedConfig, String> {
    let rest = match case.word("error_feedback")? {
        "none" => Rest::None,
        "full" => Rest::Full,
        "quantized" => Rest::Quantised,
        other => return Err(format!("configuration: error_feedback is \"{other}\"")),
    };
    let levels = if rest == Rest::Quantised { case.count("error_levels")? } else { 255 };
    Ok(adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_side(case.choice("side", SIDES)?)
        .with_projector(ProjectorKind::Dct)
        .with_basis(case.choice("basis", &[("dct3", DctBasis::Dct3), ("dct2", DctBasis::Dct2)])?)
        .with_norm(case.choice("norm", &[("l1", Norm::L1), ("l2", Norm::L2)])?)
        .with_update_proj_gap(case.count("update_proj_gap")?)
        .with_renew_at(RenewAt::Multiples)
        .with_states(if case.flag("rotate_subspace")? { States::Rotate } else { States::Keep })
        .with_rest(rest)
        .with_error_levels(u8::try_from(levels).map_err(|_| format!("configuration: error_levels is {levels}"))?))
}

const SIDES: &[(&str, Side)] = &[
    ("std", Side::Std),
    ("reverse_std", Side::ReverseStd),
    ("left", Side::Left),
    ("right", Side::Right),
    ("full", Side::Full),
];

const PROJECTORS: &[(&str, ProjectorKind)] = &[
    ("svd", ProjectorKind::Svd),
    ("dct", ProjectorKind::Dct),
    ("columns", ProjectorKind::Columns),
    ("rows", ProjectorKind::Rows),
    ("randk", ProjectorKind::Randk),
    ("random", ProjectorKind::Random),
    ("randperm", ProjectorKind::Randperm),
    ("block", ProjectorKind::Block),
];

fn adam(case: &Case, config: ProjectedConfig) -> Result<ProjectedConfig, String> {
    Ok(config
        .with_density(0.0)
        .with_beta_1(case.number("beta1")?)
        .with_beta_2(case.number("beta2")?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay")?))
}

/// Gives the subspaces of a case in place of random ones.
#[derive(Debug)]
struct Given {
    subspaces: Mutex<Vec<Subspace>>,
}

impl Projector for Given {
    fn choose(&self, _: &Renewal) -> Subspace {
        self.subspaces.lock().expect("one thread").remove(0)
    }
}

fn given(config: &ProjectedConfig, case: &Case) -> Result<ByMatrix<Projected>, String> {
    let mut subspaces = Vec::new();
    if case.has("selected") {
        let selected = case.array("selected")?;
        for renewal in 0..selected.shape[0] {
            let chosen = selected.at(renewal).i32();
            let data = TensorData::new(chosen, [selected.shape[1]]);
            let indices = Tensor::<1, Int>::from_data(data, (&Device::default(), DType::I32));
            subspaces.push(match config.projector {
                ProjectorKind::Randk => Subspace::Entries(indices),
                _ => Subspace::Coordinates(indices),
            });
        }
    } else {
        let projections = case.array("proj")?;
        for step in (0..projections.shape[0]).step_by(config.update_proj_gap) {
            subspaces.push(Subspace::Dense(projections.at(step).tensor()));
        }
    }
    config.build_with(Given { subspaces: Mutex::new(subspaces) }).map_err(|error| error.to_string())
}

/// Runs a case, comparing weights and every part of the state that the case has.
pub fn trajectory(
    case: &Case,
    config: &ProjectedConfig,
    optimizer: ByMatrix<Projected>,
    tolerance: Tolerance,
) -> Outcome {
    let (grads, rates, weights) = (case.array("grads")?, case.array("lr")?, case.array("w")?);
    let w0 = case.array("w0")?;
    let shape = [w0.shape[0], w0.shape[1]];
    let mut w = w0.tensor::<2>();
    let mut state: Option<ByMatrixState<2, ProjectedState>> = None;
    let mut worst = 0f64;
    for step in 0..grads.shape[0] {
        (w, state) = optimizer.step(rates.values[step], w, grads.at(step).tensor(), state);
        let name = |part: &str| format!("{part} at step {}", step + 1);
        let near = weights.at(step).near(&name("w"), &host(w.clone()), tolerance.0, tolerance.1)?;
        worst = worst.max(near);
        let state = state.as_ref().and_then(|state| state.matrix.as_ref()).ok_or("the matrix was not projected")?;
        compare(case, config, state, shape, step, tolerance)?;
    }
    Ok(format!("weights within {worst:.1e}"))
}

fn compare(
    case: &Case,
    config: &ProjectedConfig,
    state: &ProjectedState,
    shape: [usize; 2],
    step: usize,
    tolerance: Tolerance,
) -> Result<(), String> {
    let name = |part: &str| format!("{part} at step {}", step + 1);
    let scaled = |array: &Array| tolerance.0.max(2e-5 * array.largest());
    let check = |part: &str, ours: Vec<f32>| -> Result<(), String> {
        let expected = case.array(part)?.at(step);
        expected.near(&name(part), &ours, scaled(&expected), tolerance.1).map(|_| ())
    };
    for (part, moment) in [("m", &state.moment_1), ("v", &state.moment_2)] {
        if case.has(part) {
            check(part, host(moment.clone().ok_or(format!("{part} is missing"))?.restored()))?;
        }
    }
    let subspace = state.subspace.as_ref().ok_or("no subspace is kept")?;
    if case.has("indices") {
        let ours = subspace.indices().ok_or("no indices are kept")?;
        let expected = case.array("indices")?.at(step).i32();
        if ours != expected {
            return Err(format!("{} are {ours:?} instead of {expected:?}", name("indices")));
        }
    }
    let side = if config.right(shape) { shape[1] } else { shape[0] };
    if let Subspace::TwoSided(left, right) = subspace {
        check("proj_left", host(left.clone()))?;
        check("proj_right", host(right.clone()))?;
    } else if let Some(columns) = subspace.columns(side, &Device::default()) {
        for part in ["proj", "proj_left", "proj_right"] {
            if case.has(part) {
                let expected = case.array(part)?.at(step);
                expected.near(&name(part), &host(columns.clone()), 2e-5, 0.0)?;
            }
        }
    }
    // Without a limit no norm is remembered.
    if case.has("limiter_norm") && config.growth_limit > 0.0 {
        check("limiter_norm", vec![state.limiter_norm.ok_or("no norm is kept")? as f32])?;
    }
    if let Some(error) = &state.error {
        check("error", host(error.restored().ok_or("an error buffer without content")?))?;
    } else if case.has("error") && config.rest != Rest::None {
        return Err("no error buffer is kept".into());
    }
    if case.has("error_codes") {
        let rows = state.error.as_ref().and_then(|error| error.quantised()).ok_or("no codes are kept")?;
        let ours: Vec<i32> = rows.iter().flat_map(|row| row.codes.iter().map(|code| i32::from(*code))).collect();
        if ours != case.array("error_codes")?.at(step).i32() {
            return Err(format!("{} differ", name("error_codes")));
        }
        let (lows, highs): (Vec<f32>, Vec<f32>) = rows.iter().map(|row| (row.low, row.high)).unzip();
        case.array("error_min")?.at(step).near(&name("error_min"), &lows, 2e-5, 1e-5)?;
        case.array("error_max")?.at(step).near(&name("error_max"), &highs, 2e-5, 1e-5)?;
    }
    Ok(())
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
        let place = Place { key: number as u64, number, count };
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

fn lazy_gap(case: &Case) -> Outcome {
    let (cosines, expected) = (case.array("cosine")?, case.array("gap_after")?);
    let (mut queue, mut gap) = (Vec::new(), case.count("initial_gap")?);
    let (length, growth) = (case.count("queue_size")?, case.count("gamma_proj")?);
    for (step, (cosine, expected)) in cosines.values.iter().zip(&expected.values).enumerate() {
        let threshold = case.number("cos_threshold")?;
        gap = lowrank_optim::longer_gap(&mut queue, *cosine as f32, gap, length, threshold, growth);
        if gap as f64 != *expected {
            return Err(format!("the gap after renewal {} is {gap} instead of {expected}", step + 1));
        }
    }
    Ok("all gaps are equal".into())
}

fn groups(case: &Case) -> Outcome {
    let (bits, group) = (case.count("bits")? as u32, case.count("group")?);
    let ours = lowrank_optim::quantise_groups(&case.array("x")?.f32(), bits, group, None);
    if ours.codes.iter().map(|code| i32::from(*code)).collect::<Vec<_>>() != case.array("codes")?.i32() {
        return Err("codes differ".into());
    }
    case.array("scales")?.near("scales", &ours.scales, 1e-7, 1e-6)?;
    case.array("zeros")?.near("zeros", &ours.zeros, 0.0, 0.0)?;
    let worst = case.array("dequantized")?.near("dequantized", &ours.restored(group), 1e-6, 1e-6)?;
    Ok(format!("codes equal, values within {worst:.1e}"))
}
