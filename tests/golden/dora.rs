//! DoRA against reference values.

use burn::optim::GradientsParams;

use super::interop_peft;
use super::support::bench::{adapter, attached_to, fresh_on, near};
use super::support::case::{Case, Outcome};
use super::support::factors::{FACTORS, Names, bare, compare_gradients, config, gradients, tensors, training};

pub fn run(case: &Case) -> Outcome {
    if case.names().iter().any(|name| name.starts_with("merged.")) {
        return interop_peft::folder(case);
    }
    if !case.has("A_0") && !case.has("grad_output") {
        return Err("is of no known kind".into());
    }
    let config = config(case, "dora")?;
    let names: Names = &[("a", "A"), ("b", "B"), ("magnitude", "magnitude")];
    if case.has("A_0") {
        return training(case, &config, names, &[]);
    }
    let remark = gradients(case, &config, names)?;
    let start = adapter(&fresh_on(bare(case)?, &config)?);
    let lengths = start.tensors().into_iter().find(|(tensor, _)| tensor.field == "magnitude").ok_or("no lengths")?;
    near(case, "magnitude_init", &lengths.1.try_into_vec::<f32>().map_err(|error| format!("{error:?}"))?, 1e-5)?;
    // With the lengths that the columns have, the layer is that of plain LoRA.
    let lengths: Names = &[("a", "A"), ("b", "B"), ("magnitude", "weight_norm")];
    let even = attached_to(bare(case)?, &config, tensors(case, lengths, "")?)?;
    let plain = attached_to(bare(case)?, &self::config(case, "lora")?, tensors(case, FACTORS, "")?)?;
    let x = || Ok::<_, String>(case.array("x")?.tensor::<2>().autodiff());
    for (ours, theirs) in [(even.output(x()?), plain.output(x()?)), (even.weight(), plain.weight())] {
        let (ours, theirs) = (ours.inner(), theirs.inner());
        let share = (ours - theirs.clone()).abs().max() / theirs.abs().max();
        if share.into_scalar::<f32>() > 1e-5 {
            return Err("weight_norm is not the length of the columns".into());
        }
    }
    let exact = config.with_option("detach_norm", false);
    let bench = attached_to(bare(case)?, &exact, tensors(case, names, "")?)?;
    let y = bench.output(x()?) * case.array("grad_output")?.tensor::<2>().autodiff();
    let grads = GradientsParams::from_grads(y.sum().backward(), &bench);
    compare_gradients(case, &bench, grads, FACTORS, "_without_detach")?;
    Ok(format!("{remark}, lengths and exact gradients too"))
}
