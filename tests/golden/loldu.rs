//! LoLDU against reference values.

use lowrank_models::adapter::AdapterConfig;
use lowrank_optim::pivoted_lu;

use super::support::bench::{common, fresh, near, training};
use super::support::case::{Case, Outcome, host};
use super::support::decompositions::{first, kept, matrix, remainder, starts_at_base, tensor};

pub fn run(case: &Case) -> Outcome {
    let (rank, alpha) = (case.count("rank")?, case.number("alpha")?);
    let from_lu = case.flag("residual_from_lu").unwrap_or(false);
    let config = AdapterConfig::new("loldu")
        .with_rank(rank)
        .with_alpha(alpha)
        .with_option("train_sigma", case.flag("train_sigma")?)
        .with_option("z_init", case.word("z_init")?)
        .with_option("residual_from_lu", from_lu);
    let z_0 = first(case, if from_lu { "exp.lu_diag" } else { "init.z" }, rank)?;
    let scaled: Vec<f32> = z_0.iter().map(|z| z * (alpha / rank as f64) as f32).collect();
    remainder(case, "frozen.permuted_lower", &scaled, "frozen.upper")?;
    let names = [("permuted_lower", "frozen.permuted_lower"), ("upper", "frozen.upper")];
    let outcome = common(case, &config, &kept(case, &names, vec![("z_0", z_0)])?);

    let lu = pivoted_lu(&matrix(case, "in.weight")?);
    near(case, "exp.lu_row_permutation", &lu.permutation.iter().map(|row| *row as f32).collect::<Vec<_>>(), 0.0)?;
    near(case, "exp.lu_lower", &host(lu.lower), 5e-5)?;
    near(case, "exp.lu_diag", &lu.diagonal.iter().map(|pivot| *pivot as f32).collect::<Vec<_>>(), 5e-5)?;
    near(case, "exp.lu_unit_upper", &host(lu.upper), 5e-5)?;
    let start = if from_lu { fresh(case, &config)? } else { starts_at_base(case, &config)? };
    for (field, name) in names {
        near(case, name, &tensor(&start, field)?, 5e-5)?;
    }
    if case.word("z_init")? == "lu" {
        near(case, "init.z", &tensor(&start, "z")?, 5e-5)?;
        training(case, start, true)?;
    }
    outcome
}
