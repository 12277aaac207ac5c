//! DCT-AdamW and the transforms under it against reference values.

use burn::optim::Optimizer;
use lowrank_optim::{
    ByMatrix, Dct, DctBasis, Norm, OnRenewal, Projected, ProjectedConfig, ProjectorKind, RenewAt, Residual,
};

use super::support::case::{Case, Outcome, host};
use super::support::projected::{SIDES, Tolerance, adam, trajectory};

pub fn dct_adamw(case: &Case) -> Result<ProjectedConfig, String> {
    let rest = match case.word("error_feedback")? {
        "none" => Residual::None,
        "full" => Residual::Full,
        "quantized" => Residual::Quantised,
        other => return Err(format!("configuration: error_feedback is \"{other}\"")),
    };
    let levels = if rest == Residual::Quantised { case.count("error_levels")? } else { 255 };
    Ok(adam(case, ProjectedConfig::new(case.count("rank")?))?
        .with_side(case.choice("side", SIDES)?)
        .with_projector(ProjectorKind::Dct)
        .with_basis(case.choice("basis", &[("dct3", DctBasis::Dct3), ("dct2", DctBasis::Dct2)])?)
        .with_norm(case.choice("norm", &[("l1", Norm::L1), ("l2", Norm::L2)])?)
        .with_update_proj_gap(case.count("update_proj_gap")?)
        .with_renew_at(RenewAt::Multiples)
        .with_on_renewal(if case.flag("rotate_subspace")? { OnRenewal::Rotate } else { OnRenewal::Keep })
        .with_residual(rest)
        .with_error_levels(u8::try_from(levels).map_err(|_| format!("configuration: error_levels is {levels}"))?))
}

/// A case holds a transform or a trajectory.
pub fn run(case: &Case) -> Outcome {
    match (case.has("dct2_matrix"), case.has("grads")) {
        (true, false) => transform(case),
        (false, true) => both_transforms(case),
        _ => Err("holds neither a transform nor a trajectory".into()),
    }
}

fn transform(case: &Case) -> Outcome {
    let n = case.count("n")?;
    let dct = Dct::of(n);
    case.array("dct2_matrix")?.near("dct2_matrix", dct.matrix(), 2e-6, 0.0)?;
    let x = case.array("x")?;
    let mut worst = 0f64;
    for (name, basis) in [("dct2_of_rows", DctBasis::Dct2), ("dct3_of_rows", DctBasis::Dct3)] {
        let mut rows = x.f32();
        dct.transform_rows(&mut rows, basis);
        worst = worst.max(case.array(name)?.near(name, &rows, 2e-6, 1e-6)?);
    }
    Ok(format!("n = {n}, within {worst:.1e}"))
}

fn both_transforms(case: &Case) -> Outcome {
    let config = dct_adamw(case)?;
    let mut remarks = Vec::new();
    for fft in [false, true] {
        let config = config.clone().with_fft(fft);
        let remark = trajectory(case, &config, config.build(), Tolerance(2e-5, 1e-5))?;
        remarks.push(format!("{remark} by {}", if fft { "fast transform" } else { "product" }));
    }
    if case.has("b0") {
        vector(case, config.build())?;
    }
    Ok(remarks.join(", "))
}

/// A parameter with one dimension takes plain AdamW.
fn vector(case: &Case, optimizer: ByMatrix<Projected>) -> Result<(), String> {
    let (grads, rates, expected) = (case.array("b_grads")?, case.array("lr")?, case.array("b")?);
    let mut b = case.array("b0")?.tensor::<1>();
    let mut state = None;
    for step in 0..grads.shape[0] {
        (b, state) = optimizer.step(rates.values[step], b, grads.at(step).tensor(), state);
        expected.at(step).near(&format!("b at step {}", step + 1), &host(b.clone()), 2e-6, 1e-5)?;
    }
    Ok(())
}
