//! Bayesian-LoRA against reference values: quantisers with gates, and whole adapters.

use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{
    AdapterConfig, BayesianLora, GateDraws, GivenTensors, HardConcrete, Input, PenaltyAt, level_penalty, penalty,
};
use lowrank_models::ops::bit_quantised;

use super::support::bench::{Bench, adapter, attached_to, batch, near};
use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    match case.has("upstream") {
        true => quantiser(case),
        false => whole(case),
    }
}

/// The gates of a case.
fn gate(case: &Case) -> Result<HardConcrete, String> {
    let dead_logit = match &case.config["dead_logit"] {
        serde_json::Value::Null => HardConcrete::default().dead_logit,
        value => Some(value.as_f64().ok_or_else(|| format!("configuration: dead_logit is {value}"))?),
    };
    Ok(HardConcrete {
        beta: case.number("beta")?,
        zeta: case.number("zeta")?,
        gamma: case.number("gamma")?,
        threshold: case.number("threshold")?,
        dead_logit,
    })
}

/// Number of levels above 2 bits.
fn levels(case: &Case) -> Result<usize, String> {
    let bits = case.config["bits"].as_array().ok_or("configuration: bits")?;
    let known = [4, 8, 16, 32];
    let as_known = bits.iter().zip(known).all(|(bits, known)| bits.as_u64() == Some(known));
    match as_known && (1..=known.len()).contains(&bits.len()) {
        true => Ok(bits.len()),
        false => Err(format!("configuration: bits are {bits:?}; each level doubles those of the one before, from 4")),
    }
}

/// A tracked tensor of the case.
fn tracked<const D: usize>(case: &Case, name: &str) -> Result<Tensor<D>, String> {
    Ok(case.array(name)?.tensor::<D>().autodiff().require_grad())
}

fn quantiser(case: &Case) -> Outcome {
    if case.has("x") && case.array("x")?.shape.len() != 2 {
        return Err("x is no matrix".into());
    }
    if (case.number("clip_factor")? - (1.0 - 1e-7)).abs() > 1e-12 {
        return Err("configuration: clip_factor is not 1 - 1e-7".into());
    }
    let (gate, levels) = (gate(case)?, levels(case)?);
    let (x, x_max, phi) = (tracked::<2>(case, "x")?, tracked::<1>(case, "x_max")?, tracked::<1>(case, "phi")?);
    let z = gate.sampled(phi.clone(), &case.array("u")?.f32());
    near(case, "gate", &host(z.clone().inner()), 1e-5)?;
    let q = bit_quantised(x.clone(), x_max.clone(), z.clone());
    near(case, "quantised", &host(q.clone().inner()), 1e-5)?;
    let mut grads = (q * batch(case, "upstream")?).sum().backward();
    let none = |name: &str| format!("{name} has no gradient");
    let grad = x.grad_remove(&mut grads).ok_or_else(|| none("x"))?;
    near(case, "grad_x", &host(grad), 1e-5)?;
    // The residue of rounding to 16 bits and more is noise in f32.
    let fine = host(z.inner()).iter().take_while(|z| **z > 0.0).count() > 2;
    let grad = x_max.grad_remove(&mut grads).ok_or_else(|| none("x_max"))?;
    near(case, "grad_x_max", &host(grad), if fine { 1e-2 } else { 1e-5 })?;
    let grad = phi.grad_remove(&mut grads).map_or_else(|| vec![0.0; levels], host);
    near(case, "grad_phi", &grad, 1e-5)?;

    let probability = || gate.probability(phi.clone());
    near(case, "prob_on", &host(probability().inner()), 1e-5)?;
    let bits: Vec<f64> = (0..levels).map(|level| (4u64 << level) as f64).collect();
    for (kind, weights) in [("const", vec![1.0; levels]), ("bits", bits)] {
        let term = level_penalty(probability().reshape([1, levels]), &weights);
        near(case, &format!("regulariser_{kind}"), &host(term.clone().inner()), 1e-5)?;
        let mut grads = term.sum().backward();
        let grad = phi.grad_remove(&mut grads).ok_or_else(|| none("phi"))?;
        near(case, &format!("grad_phi_regulariser_{kind}"), &host(grad), 2e-5)?;
    }
    let decided = gate.decided(phi.inner());
    near(case, "test_gate", &host(decided.clone()), 0.0)?;
    near(case, "quantised_test", &host(bit_quantised(x.inner(), x_max.inner(), decided)), 1e-5)?;
    Ok("gates, quantised values, penalties and gradients are equal".into())
}

const TENSORS: [&str; 3] = ["A", "E", "B"];

/// Values of the tensors of A, E and B, one after another.
fn joined(case: &Case, word: &str) -> Result<Vec<f32>, String> {
    let parts: Result<Vec<Vec<f32>>, String> =
        TENSORS.iter().map(|tensor| Ok(case.array(&format!("{word}_{tensor}"))?.f32())).collect();
    Ok(parts?.concat())
}

fn whole(case: &Case) -> Outcome {
    let (gate, levels, rank) = (gate(case)?, levels(case)?, case.count("r")?);
    let [quantises, gates] = ["x_max_A", "rank_phi"].map(|name| case.has(name));
    let mode = match (quantises, gates) {
        (true, true) => "both",
        (true, false) => "quant",
        (false, true) => "rank",
        (false, false) => return Err("the case has neither quantisers nor gates of components".into()),
    };
    let constants = HardConcrete { threshold: gate.threshold, dead_logit: gate.dead_logit, ..HardConcrete::default() };
    if (gate.beta - constants.beta).abs() > 1e-12 || (gate.zeta, gate.gamma) != (constants.zeta, constants.gamma) {
        return Err("configuration: beta, zeta or gamma is not that of the method".into());
    }
    let config = AdapterConfig::new("bayesian-lora")
        .with_rank(rank)
        .with_alpha(case.number("alpha")?)
        .with_option("mode", mode)
        .with_option("nested", case.flag("nested")?)
        .with_option("max_bits", 2usize << levels)
        .with_option("mu_q", case.number("mu_quant")?)
        .with_option("mu_r", case.number("mu_rank")?)
        .with_option("test_threshold", gate.threshold)
        .with_option("dead_logit", gate.dead_logit);
    let file = |name: &str, shape: &[usize]| -> Result<TensorData, String> {
        Ok(TensorData::new(case.array(name)?.f32(), shape.to_vec()))
    };
    let (d_in, d_out) = (case.count("d_in")?, case.count("d_out")?);
    let mut tensors = GivenTensors::from([
        ("a".into(), file("A", &[rank, d_in])?),
        ("e".into(), file("E", &[rank])?),
        ("b".into(), file("B", &[d_out, rank])?),
    ]);
    if quantises {
        tensors.insert("x_max".into(), TensorData::new(joined(case, "x_max")?, [3]));
        tensors.insert("phi".into(), TensorData::new(joined(case, "phi")?, [3, levels]));
    }
    if gates {
        tensors.insert("psi".into(), file("rank_phi", &[rank])?);
    }
    let layer = Dense::from_parts(case.array("W")?.tensor::<2>().transpose().autodiff(), None);
    let bench = attached_to(layer, &config, tensors)?;
    let adapter = adapter(&bench);
    if (adapter.place().scale - case.number("scale")?).abs() > 1e-12 {
        return Err(format!("the scale is {} instead of {}", adapter.place().scale, case.number("scale")?));
    }
    let own = adapter.structure.downcast_ref::<BayesianLora>().ok_or("the adapter is not bayesian-lora")?;

    let draw = |present: bool, name: &str| match present {
        true => case.array(name).map(|draws| draws.f32()),
        false => Ok(Vec::new()),
    };
    let draws = GateDraws {
        levels: [draw(quantises, "u_A")?, draw(quantises, "u_E")?, draw(quantises, "u_B")?],
        components: draw(gates, "rank_u")?,
    };
    let drawn = own.gates(Some(&draws));
    let mut fine = false;
    for (tensor, z) in TENSORS.iter().zip(drawn.levels.iter().flatten()) {
        near(case, &format!("gate_{tensor}"), &host(z.clone().inner()), 1e-5)?;
        fine |= host(z.clone().inner()).iter().take_while(|z| **z > 0.0).count() > 2;
    }
    if let Some(z) = &drawn.components {
        near(case, "rank_gate", &host(z.clone().inner()), 1e-5)?;
        near(case, "rank_gate_effective", &host(own.effective(z.clone()).inner()), 1e-5)?;
    }
    if quantises {
        let (a, e, b) = own.quantised(&drawn);
        near(case, "quantised_A", &host(a.inner().transpose()), 1e-5)?;
        near(case, "quantised_E", &host(e.inner()), 1e-5)?;
        near(case, "quantised_B", &host(b.inner().transpose()), 1e-5)?;
    }
    let factors = own.factors_with(&drawn);
    near(case, "delta_W", &host(factors.clone().product().inner().transpose()), 1e-5)?;
    let weight = bench.base().autodiff();
    let y = lowrank_models::adapter::Base::new(&weight, None).plus_product(
        Input::new(batch(case, "x")?),
        factors.a,
        factors.b,
        factors.scale,
    );
    near(case, "y", &host(y.clone().inner()), 1e-5)?;
    let task = (y - batch(case, "target")?).square().mean().mul_scalar(0.5);
    near(case, "task_loss", &host(task.clone().inner()), 1e-5)?;
    for (name, term) in ["regulariser_quant", "regulariser_rank"].into_iter().zip(own.penalties()) {
        if let Some(term) = term {
            near(case, name, &host(term.inner()), 1e-5)?;
        }
    }
    let total = task + penalty(&bench, PenaltyAt::Loss).ok_or("the adapter has no penalty")?;
    near(case, "total_loss", &host(total.clone().inner()), 1e-5)?;
    let mut grads = GradientsParams::from_grads(total.backward(), &bench);
    let none = |name: &str| format!("{name} has no gradient");
    let grad = grads.remove::<2>(own.a.id).ok_or_else(|| none("A"))?;
    near(case, "grad_A", &host(grad.transpose()), 1e-5)?;
    let grad = grads.remove::<1>(own.e.id).ok_or_else(|| none("E"))?;
    near(case, "grad_E", &host(grad), 1e-5)?;
    let grad = grads.remove::<2>(own.b.id).ok_or_else(|| none("B"))?;
    near(case, "grad_B", &host(grad.transpose()), 1e-5)?;
    if let (Some(x_max), Some(phi)) = (&own.x_max, &own.phi) {
        let x_max = host(grads.remove::<1>(x_max.id).ok_or_else(|| none("x_max"))?);
        let phi = host(grads.remove::<2>(phi.id).ok_or_else(|| none("phi"))?);
        for (place, tensor) in TENSORS.iter().enumerate() {
            near(case, &format!("grad_x_max_{tensor}"), &x_max[place..=place], if fine { 1e-2 } else { 1e-5 })?;
            near(case, &format!("grad_phi_{tensor}"), &phi[place * levels..][..levels], 2e-5)?;
        }
    }
    if let Some(psi) = &own.psi {
        near(case, "grad_rank_phi", &host(grads.remove::<1>(psi.id).ok_or_else(|| none("psi"))?), 2e-5)?;
    }

    let mut on = vec![0.0; rank];
    own.components().into_iter().for_each(|place| on[place] = 1.0);
    if gates {
        near(case, "test_rank_gate", &on, 0.0)?;
    }
    let [a, e, b] = own.bits().map(|bits| bits as f32);
    let bits = match case.config["order_of_test_bits"].as_str() {
        Some("A, B, E") => [a, b, e],
        Some("A, E, B") => [a, e, b],
        other => return Err(format!("configuration: order_of_test_bits is {other:?}")),
    };
    near(case, "test_bits", &bits, 0.0)?;
    near(case, "test_merged_W", &host(bench.weight().transpose()), 1e-5)?;
    let [operations, dense] = own.bit_operations(case.count("activation_bits")?);
    near(case, "test_bops_per_token", &[operations as f32], 1e-6)?;
    near(case, "dense_bops_per_token", &[dense as f32], 1e-6)?;
    exported(&bench, own)?;
    Ok("gates, quantised factors, penalties, gradients and the final adapter are equal".into())
}

/// Factors without the components that are off are the same update.
fn exported(bench: &Bench, own: &BayesianLora) -> Result<(), String> {
    use lowrank_models::adapter::Structure;
    let [a, b] = own.as_factors().ok_or("no factors")?;
    if a.dims()[1] != own.components().len() {
        return Err("components that are off are exported".into());
    }
    let whole = host((bench.weight() - bench.base()).transpose());
    let dense = match a.dims()[1] {
        0 => vec![0.0; whole.len()],
        _ => host(a.matmul(b).inner().transpose()),
    };
    let apart = whole.iter().zip(&dense).map(|(one, two)| (one - two).abs()).fold(0f32, f32::max);
    if apart > 1e-5 { Err(format!("exported factors are {apart} away")) } else { Ok(()) }
}
