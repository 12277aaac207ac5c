//! ALLoRA against reference values.

use burn::optim::GradientsParams;
use lowrank_models::adapter::{AdapterConfig, Allora, Rule};
use lowrank_optim::registry::Options;

use super::support::bench::{adapter, near};
use super::support::case::{Case, Outcome, host};
use super::support::rules::{bench, gradients, text, trained};

pub fn run(case: &Case) -> Outcome {
    let norm_of = case.choice("norm_of", &[("ba_row", "ba_row"), ("b_row", "b_row")])?;
    let rank = case.count("rank")?;
    let options = [("eta".to_string(), case.number("eta")?.into()), ("norm_of".into(), norm_of.into())];
    let rule = <dyn Rule>::named("allora", &Options::from_iter(options)).map_err(text)?;
    let config = rule.prepared(AdapterConfig::new("lora").with_rank(rank)).map_err(text)?;
    if case.has("A_0") {
        return trained(case, &config, &*rule);
    }
    let plain = AdapterConfig::new("lora").with_rank(rank).with_alpha(rank as f64);
    for (config, word) in [(&config, ""), (&plain, "plain_")] {
        let bench = bench(case, case.array("W")?, config, ["A", "B"])?;
        let x = case.array("x")?.tensor::<2>().autodiff().require_grad();
        let y = bench.output(x.clone());
        near(case, "y", &host(y.clone().inner()), 1e-5)?;
        let loss = (y - case.array("target")?.tensor::<2>().autodiff()).square().mean();
        near(case, "loss", &host(loss.clone().inner()), 1e-5)?;
        let mut grads = loss.backward();
        near(case, "grad_x", &host(x.grad_remove(&mut grads).ok_or("x has no gradient")?), 1e-5)?;
        for (factor, gradient) in gradients(&bench, &mut GradientsParams::from_grads(grads, &bench))? {
            near(case, &format!("{word}grad_{factor}"), &gradient, 1e-5)?;
        }
        let adapter = adapter(&bench);
        if let Some(allora) = adapter.structure.downcast_ref::<Allora>() {
            near(case, "row_scale", &host(allora.paces().inner()), 1e-5)?;
            // Layers that compose their weight give the same gradients.
            let x = case.array("x")?.tensor::<2>().autodiff();
            let y = x.matmul(bench.composed());
            let loss = (y - case.array("target")?.tensor::<2>().autodiff()).square().mean();
            for (factor, gradient) in gradients(&bench, &mut GradientsParams::from_grads(loss.backward(), &bench))? {
                near(case, &format!("{word}grad_{factor}"), &gradient, 1e-5)?;
            }
        }
    }
    Ok("output, paces and gradients are equal".into())
}
