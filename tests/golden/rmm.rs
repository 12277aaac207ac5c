//! Reversible merging against reference values.

use lowrank_models::adapter::compose::{Composite, Composition, Matrix, Rmm, Side};

use super::support::case::{Case, Outcome};
use super::support::compose::{layer, near};

pub fn run(case: &Case) -> Outcome {
    let layer = layer(case)?;
    let p = case.count("p")?;
    let flag = |key: &str, usual: bool| case.config[key].as_bool().unwrap_or(usual);
    let rmm = Rmm {
        p: Some(p),
        center: flag("center", true),
        pad: flag("pad", false),
        align: flag("align", false),
        ..Rmm::default()
    };
    let fail = |error: lowrank_models::adapter::compose::ComposeError| error.to_string();
    let (all, kept) = rmm.pooled(&layer).map_err(fail)?;
    if kept != p {
        return Err(format!("{kept} directions are kept instead of {p}"));
    }
    let exact = flag("exact", false);
    for (side, mean, projector, letter) in
        [(&all.b, "mean_B_rows", "projector_B_rows", "B"), (&all.a, "mean_A_cols", "projector_A_cols", "A")]
    {
        near(case, mean, &side.mean.transpose(), 1e-5)?;
        let expected = case.array(projector)?;
        expected.near(projector, &projectors(side, p), 1e-5 * expected.largest().max(1e-6), 0.0)?;
        let name = format!("singular_values_{letter}");
        let values: Vec<f32> = side.values.iter().flatten().map(|value| *value as f32).collect();
        let expected = case.array(&name)?;
        expected.near(&name, &values, 1e-5 * expected.largest(), 0.0)?;
        let name = format!("residual_energy_{letter}");
        let residuals: Vec<f32> = side.residuals(p).into_iter().map(|value| value as f32).collect();
        let expected = case.array(&name)?;
        let bound = if exact { 1e-6 } else { 1e-5 * expected.largest() };
        expected.near(&name, &residuals, bound, 0.0)?;
    }
    let composed = rmm.compose(&layer).map_err(fail)?;
    let ratio = composed.report["storage_ratio"].as_f64().unwrap_or(f64::NAN);
    let expected = case.number("storage_ratio")?;
    let sides = (layer.shape()[0] + layer.shape()[1]) as f64;
    // Ours counts the scales too.
    let scales = 1.0 / (sides * layer.sources[0].rank() as f64);
    if (ratio - scales - expected).abs() > 1e-9 {
        return Err(format!("the storage ratio is {} instead of {expected}", ratio - scales));
    }
    let Composite::Pool(pool) = composed.result else { return Err("made no pool".into()) };
    for number in 0..layer.sources.len() {
        let (a, b, scale) = pool.revert(number);
        near(case, &format!("reconstructed{number}.delta"), &(&b * &a * scale), 1e-5)?;
        near(case, &format!("reconstructed{number}.A"), &a, 1e-5)?;
        near(case, &format!("reconstructed{number}.B"), &b, 1e-5)?;
    }
    near(case, "separate_average.delta", &(all.b.mean.transpose() * &all.a.mean), 1e-5)?;
    Ok("means, directions, residuals and rebuilt adapters are equal".into())
}

/// `U_p U_p^T` of every position.
fn projectors(side: &Side, p: usize) -> Vec<f32> {
    let rank = side.mean.nrows();
    let of = |position: usize| {
        let basis = Matrix::from_column_slice(rank, p, &side.basis.column(position).as_slice()[..rank * p]);
        (&basis * basis.transpose()).iter().map(|value| *value as f32).collect::<Vec<_>>()
    };
    (0..side.mean.ncols()).flat_map(of).collect()
}
