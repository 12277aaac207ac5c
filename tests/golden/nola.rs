//! NOLA against reference values.

use lowrank_models::adapter::{AdapterConfig, Nola};

use super::support::bases::{bench, wrong};
use super::support::bench::{adapter, common, given, near};
use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    let variant = case.word("variant")?;
    let config = AdapterConfig::new("nola")
        .with_rank(case.count("rank")?)
        .with_alpha(case.number("alpha")?)
        .with_option("variant", variant)
        .with_option("num_basis_a", case.count("num_basis_a")?)
        .with_option("num_basis_b", case.count("num_basis_b")?);
    let mut kept = given(case, &["frozen"])?;
    if variant == "vision" && kept.remove("a0").is_some() && case.array("frozen.a0")?.largest() != 0.0 {
        return Err("the vision form has no fixed part, and frozen.a0 is not zero".into());
    }
    let adapter = adapter(&bench(case, &config, &kept)?);
    let nola = adapter.structure.downcast_ref::<Nola>().ok_or_else(|| wrong("nola"))?;
    let [a, b] = nola.mixtures();
    near(case, "exp.factor_a", &host(a.inner().transpose()), 1e-5)?;
    near(case, "exp.factor_b", &host(b.inner().transpose()), 1e-5)?;
    common(case, &config, &kept)
}
