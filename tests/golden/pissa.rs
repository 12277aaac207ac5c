//! PiSSA against reference values.

use lowrank_models::adapter::AdapterConfig;

use super::support::bench::{adapter, fresh_on, near};
use super::support::case::{Case, Outcome, host};
use super::support::factors::{FACTORS, bare, config, singular_values, training};

pub fn run(case: &Case) -> Outcome {
    let config = AdapterConfig { init: "pissa".into(), ..config(case, "lora")? };
    if case.has("A_0") {
        return training(case, &config, FACTORS, &[("origin.a", "A_0"), ("origin.b", "B_0")]);
    }
    let bench = fresh_on(bare(case)?, &config)?;
    near(case, "y", &host(bench.output(case.array("x")?.tensor::<2>().autodiff()).inner()), 1e-5)?;
    let attached = adapter(&bench);
    let weight = case.array("W")?.tensor::<2>().transpose();
    let product = attached.structure().delta_weight(&weight).unwrap().inner();
    near(case, "scaled_product", &host(product.transpose()), 1e-5)?;
    let origin = attached.origin.as_ref().ok_or("nothing is taken from the weight")?;
    near(case, "W_residual", &host((weight.clone() - origin.delta().inner()).transpose()), 1e-5)?;
    let [a, b] = [&origin.a, &origin.b].map(|factor| factor.val().inner());
    near(case, "A_gram", &host(a.clone().matmul(a.transpose())), 1e-5)?;
    near(case, "B_gram", &host(b.clone().transpose().matmul(b)), 1e-5)?;
    singular_values(case, &weight)?;
    Ok("start and output are equal".into())
}
