//! GaLore and Q-GaLore against reference values.

use lowrank_optim::narrow::groups::{Rounding, quantise_groups};
use lowrank_optim::{Inner, MomentType, ProjectedConfig};

use super::support::case::{Case, Outcome};
use super::support::projected::{SIDES, Tolerance, adam, trajectory};

pub fn run(case: &Case) -> Outcome {
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
    let ours = quantise_groups(&case.array("x")?.f32(), bits, group, Rounding::Nearest);
    if ours.codes.iter().map(|code| i32::from(*code)).collect::<Vec<_>>() != case.array("codes")?.i32() {
        return Err("codes differ".into());
    }
    case.array("scales")?.near("scales", &ours.scales, 1e-7, 1e-6)?;
    case.array("zeros")?.near("zeros", &ours.zeros, 0.0, 0.0)?;
    let worst = case.array("dequantized")?.near("dequantized", &ours.restored(group), 1e-6, 1e-6)?;
    Ok(format!("codes equal, values within {worst:.1e}"))
}
