//! SVFit against reference values.

use lowrank_models::adapter::AdapterConfig;
use lowrank_optim::thin_svd;

use super::support::bench::{batch, common, fresh, near, training};
use super::support::case::{Case, Outcome, host};
use super::support::decompositions::{first, kept, matrix, own, remainder, starts_at_base, tensor};

pub fn run(case: &Case) -> Outcome {
    let rank = case.count("rank")?;
    let config = AdapterConfig::new("svfit").with_rank(rank);
    let sigma = first(case, "exp.singular_values", rank)?;
    remainder(case, "frozen.u", &sigma, "frozen.vt")?;
    let outcome =
        common(case, &config, &kept(case, &[("u", "frozen.u"), ("vt", "frozen.vt")], vec![("sigma_0", sigma)])?);

    let weight = matrix(case, "in.weight")?;
    let side = *weight.dims().iter().min().unwrap_or(&0);
    let values = thin_svd(&weight, side).values;
    near(case, "exp.singular_values", &values.iter().map(|value| *value as f32).collect::<Vec<_>>(), 2e-5)?;
    let energy = values.iter().scan(0.0, |sum, value| {
        *sum += value * value;
        Some(*sum)
    });
    let energy: Vec<f64> = energy.collect();
    let total = energy[side - 1];
    near(case, "exp.energy", &energy.iter().map(|sum| (sum / total) as f32).collect::<Vec<_>>(), 2e-5)?;
    for name in case.names() {
        let Some(share) = name.strip_prefix("exp.rank_for_energy_") else { continue };
        let share: f64 = share.parse().map_err(|_| format!("{name} names no share"))?;
        let bench = fresh(case, &AdapterConfig::new("svfit").with_option("energy", share))?;
        near(case, &name, &[tensor(&bench, "sigma")?.len() as f32], 0.0)?;
    }
    let bench = own(case, &config, "p")?;
    near(case, "exp.y", &host(bench.output(batch(case, "in.x")?).inner()), 2e-5)?;
    near(case, "exp.merged_w", &host(bench.weight().transpose()), 2e-5)?;
    training(case, starts_at_base(case, &config)?, true)?;
    outcome
}
