//! Structures that stand on a decomposition of the weight: with the decomposition of the case, and with one of our own.

use burn::tensor::{Tensor, TensorData};
use lowrank_models::adapter::{AdapterConfig, GivenTensors};
use lowrank_optim::{pivoted_lu, thin_svd};

use super::adapters::{Bench, adapter, attached, batch, common, fresh, given, near, regulariser, training};
use super::case::{Case, Outcome, host};

/// Tensors of a case under other names; `values` gives some of our own.
fn kept(case: &Case, names: &[(&str, &str)], values: Vec<(&str, Vec<f32>)>) -> Result<GivenTensors, String> {
    let mut kept = GivenTensors::new();
    for (field, name) in names {
        let array = case.array(name)?;
        kept.insert(field.to_string(), TensorData::new(array.f32(), array.shape.clone()));
    }
    for (field, values) in values {
        let count = values.len();
        kept.insert(field.to_string(), TensorData::new(values, [count]));
    }
    Ok(kept)
}

fn matrix(case: &Case, name: &str) -> Result<Tensor<2>, String> {
    Ok(case.array(name)?.tensor())
}

/// The weight less a part of it, `left diag(values) right`, is the case's remainder.
fn remainder(case: &Case, left: &str, values: &[f32], right: &str) -> Result<(), String> {
    let values = Tensor::<1>::from_data(values, &Default::default()).unsqueeze::<2>();
    let part = (matrix(case, left)? * values).matmul(matrix(case, right)?);
    let rest = host(matrix(case, "in.weight")? - part);
    let size = case.array("in.weight")?.largest();
    case.array("frozen.residual")?.near("frozen.residual", &rest, 2e-5 * size, 0.0).map(|_| ())
}

/// The first values of a tensor.
fn first(case: &Case, name: &str, count: usize) -> Result<Vec<f32>, String> {
    let mut values = case.array(name)?.f32();
    values.truncate(count);
    Ok(values)
}

/// A tensor of an adapter, laid out as in the case.
fn tensor(bench: &Bench, field: &str) -> Result<Vec<f32>, String> {
    let found = adapter(bench).tensors().into_iter().find(|(tensor, _)| tensor.field == field);
    let (_, data) = found.ok_or_else(|| format!("the adapter has no tensor {field}"))?;
    data.try_into_vec().map_err(|error| format!("{field}: {error:?}"))
}

/// The tensors that an adapter of our own begins with, with the trained ones of the case in place of their like.
fn own(case: &Case, config: &AdapterConfig, word: &str) -> Result<Bench, String> {
    let start = adapter(&fresh(case, config)?);
    let mut tensors: GivenTensors = start.tensors().into_iter().map(|(tensor, data)| (tensor.field, data)).collect();
    tensors.extend(given(case, &[word])?);
    attached(case, config, tensors)
}

/// An adapter that begins by itself leaves the layer as it is.
fn starts_at_base(case: &Case, config: &AdapterConfig) -> Result<Bench, String> {
    let bench = fresh(case, config)?;
    near(case, "exp.y_base", &host(bench.output(batch(case, "in.x")?).inner()), 1e-5)?;
    Ok(bench)
}

pub fn svfit(case: &Case) -> Outcome {
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

pub fn sorsa(case: &Case) -> Outcome {
    let (rank, gamma) = (case.count("rank")?, case.number("gamma")?);
    let mut config = AdapterConfig::new("sorsa").with_rank(rank).with_option("gamma", gamma);
    config.alpha = case.config["alpha"].as_f64();
    let scale = config.alpha.map_or(1.0, |alpha| alpha / rank as f64) as f32;
    let sigma = case.array("exp.svd_s")?.f32();
    let valued = matrix(case, "exp.svd_b")? * case.array("exp.svd_s")?.tensor::<1>().unsqueeze();
    let mut tensors = kept(case, &[("origin.a", "exp.svd_a")], Vec::new())?;
    tensors.insert("origin.b".into(), valued.clone().into_data());
    let scaled: Vec<f32> = sigma.iter().map(|value| value * scale).collect();
    remainder(case, "exp.svd_b", &scaled, "exp.svd_a")?;
    let outcome = common(case, &config, &tensors);

    tensors.extend(given(case, &["p"])?);
    regulariser(case, &attached(case, &config.clone().with_option("gamma", 1.0), tensors)?, 1.0)?;

    let start = starts_at_base(case, &config)?;
    near(case, "exp.svd_s", &tensor(&start, "s")?, 2e-5)?;
    let part = |b: Tensor<2>, a: Tensor<2>| b.matmul(a);
    let expected = part(valued, matrix(case, "exp.svd_a")?);
    let d_out = expected.dims()[0];
    let ours = |field: &str, shape: [usize; 2]| -> Result<Tensor<2>, String> {
        Ok(Tensor::from_data(TensorData::new(tensor(&start, field)?, shape), &Default::default()))
    };
    let d_in = expected.dims()[1];
    let s = Tensor::<1>::from_data(tensor(&start, "s")?.as_slice(), &Default::default());
    let difference = part(ours("b", [d_out, rank])? * s.unsqueeze(), ours("a", [rank, d_in])?) - expected;
    if difference.abs().max().into_scalar::<f32>() as f64 > 2e-5 * case.array("in.weight")?.largest() {
        return Err("the principal part of our own decomposition is another".into());
    }
    // From the decomposition itself, and without the pull, training does not depend on signs.
    let begins_there = ["a", "s", "b"].iter().all(|name| {
        let (init, svd) = (case.array(&format!("init.{name}")), case.array(&format!("exp.svd_{name}")));
        init.is_ok_and(|init| svd.is_ok_and(|svd| init.values == svd.values))
    });
    if begins_there && gamma == 0.0 {
        training(case, start, false)?;
    }
    outcome
}

pub fn salt(case: &Case) -> Outcome {
    let relu = match case.config["relu"].as_bool() {
        Some(true) => "matrix",
        Some(false) => "none",
        None => case.word("relu")?,
    };
    let config = AdapterConfig::new("salt")
        .with_rank(case.count("rank")?)
        .with_option("top_k", case.count("top_k")?)
        .with_option("relu", relu)
        .with_option("reg_multiplier", case.number("reg_weight")?);
    let init = case.choice("init", &[("zero_y", "default"), ("small_random", "small_random")])?;
    let config = AdapterConfig { init: init.into(), ..config };
    let frozen = kept(case, &[("u", "frozen.u"), ("s", "frozen.s"), ("vt", "frozen.vt")], Vec::new())?;
    let outcome = common(case, &config, &frozen);

    let with = |key: &str, value: serde_json::Value| {
        let mut tensors = frozen.clone();
        tensors.extend(given(case, &["p"])?);
        attached(case, &config.clone().with_option(key, value), tensors)
    };
    regulariser(case, &with("reg_multiplier", 1.0.into())?, 1.0)?;
    let (u, vt) = (matrix(case, "frozen.u")?, matrix(case, "frozen.vt")?);
    for (name, relu) in [("exp.core_before_relu", "none"), ("exp.core", relu)] {
        let merged = with("relu", relu.into())?.weight().transpose();
        near(case, name, &host(u.clone().transpose().matmul(merged).matmul(vt.clone().transpose())), 1e-5)?;
    }
    let start = if init == "default" { starts_at_base(case, &config)? } else { fresh(case, &config)? };
    near(case, "frozen.s", &tensor(&start, "s")?, 2e-5)?;
    outcome
}

pub fn loldu(case: &Case) -> Outcome {
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
