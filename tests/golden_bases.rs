//! Runners of the structures that mix fixed matrices, cosines, wavelets and tensor networks: the configuration of their cases, and what those hold
//! beyond what all do.

use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_models::adapter::{
    AdapterConfig, AnyStructure, GivenTensors, PenaltyAt, RandLora, Regulariser, Wavelet, penalty,
};

use super::adapters::{Bench, adapter, attached, common, given, gradients, near, slope};
use super::case::{Case, Outcome, host};

/// The adapter of a case at `p.*`.
fn bench(case: &Case, config: &AdapterConfig, kept: &GivenTensors) -> Result<Bench, String> {
    let mut tensors = given(case, &["p"])?;
    tensors.extend(kept.clone());
    attached(case, config, tensors)
}

fn wrong(name: &str) -> String {
    format!("the adapter is not {name}")
}

/// A list of whole numbers of the configuration.
fn counts(case: &Case, key: &str) -> Result<serde_json::Value, String> {
    match &case.config[key] {
        list @ serde_json::Value::Array(_) => Ok(list.clone()),
        other => Err(format!("configuration: {key} is {other} instead of a list")),
    }
}

pub fn randlora(case: &Case) -> Outcome {
    let mut config = AdapterConfig::new("randlora")
        .with_rank(case.count("rank")?)
        .with_alpha(case.number("alpha")?)
        .with_option("sqrt_n_scaling", case.flag("sqrt_n_scaling")?);
    let mut kept = given(case, &["frozen"])?;
    if let Some(s) = case.config["sparse_s"].as_f64() {
        config = config.with_option(if s == 3.0 { "sparse" } else { "very_sparse" }, true);
        for (draws, basis) in [("uniform_a", "frozen.basis_a"), ("uniform_b", "frozen.basis_b")] {
            if let Some(draws) = kept.remove(draws) {
                let draws: Vec<f32> = draws.try_into_vec().map_err(|error| format!("{basis}: {error:?}"))?;
                near(case, basis, &RandLora::ternary(&draws, s), 1e-5)?;
            }
        }
    }
    common(case, &config, &kept)
}

pub fn nola(case: &Case) -> Outcome {
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
    let AnyStructure::Nola(nola) = adapter(&bench(case, &config, &kept)?).structure else {
        return Err(wrong("nola"));
    };
    let [a, b] = nola.factors();
    near(case, "exp.factor_a", &host(a.inner().transpose()), 1e-5)?;
    near(case, "exp.factor_b", &host(b.inner().transpose()), 1e-5)?;
    common(case, &config, &kept)
}

pub fn tera(case: &Case) -> Outcome {
    let config = AdapterConfig::new("tera")
        .with_option("out_modes", counts(case, "out_dims")?)
        .with_option("in_modes", counts(case, "in_dims")?)
        .with_option("ranks", counts(case, "ranks")?)
        .with_option("scale", case.number("scaling")?)
        .with_option("zero_mode", case.count("zero_mode")?);
    let mut kept = given(case, &["frozen"])?;
    // The core as a matrix between the ranks of the output and those of the input.
    let core = case.array("frozen.core")?;
    let outputs = case.config["out_dims"].as_array().map_or(0, Vec::len);
    let (rows, columns) = core.shape.split_at(outputs);
    let shape = [rows.iter().product::<usize>(), columns.iter().product()];
    kept.insert("core".into(), TensorData::new(core.f32(), shape));
    common(case, &config, &kept)
}

pub fn wara(case: &Case) -> Outcome {
    let config = AdapterConfig::new("wara")
        .with_rank(case.count("rank")?)
        .with_alpha(case.number("alpha")?)
        .with_option("wavelet", case.word("wavelet")?)
        .with_option("levels", case.count("levels")?);
    case.choice("boundary", &[("periodic", ())])?;
    let wavelet = case.choice("wavelet", &[("haar", Wavelet::Haar), ("db2", Wavelet::Db2)])?;
    for (name, side) in [("exp.analysis_in", "d_in"), ("exp.analysis_out", "d_out")] {
        near(case, name, &host(wavelet.analysis(case.count(side)?, &Device::default())), 1e-5)?;
    }
    common(case, &config, &GivenTensors::new())
}

pub fn tlora(case: &Case) -> Outcome {
    let (rank, residual) = (case.count("residual_rank")?, case.word("residual")?);
    let regulariser = case.word("regulariser")?;
    let config = AdapterConfig::new("tlora")
        .with_rank(rank)
        .with_option("out_dims", counts(case, "out_dims")?)
        .with_option("in_dims", counts(case, "in_dims")?)
        .with_option("transform_rank", case.count("transform_rank")?)
        .with_option("residual", residual)
        .with_option("regulariser", regulariser)
        .with_option("reg_weight", case.number("reg_weight")?);
    let config = match residual {
        "lora" => config.with_alpha(case.number("residual_scaling")? * rank as f64),
        _ => config,
    };
    // The penalty itself, also where training is without.
    let weighted = bench(case, &config.clone().with_option("reg_weight", 1.0), &GivenTensors::new())?;
    let AnyStructure::TLora(tlora) = adapter(&weighted).structure else { return Err(wrong("tlora")) };
    near(case, "exp.transform", &host(tlora.transform().inner()), 1e-5)?;
    let [a, b] = tlora.residual();
    near(case, "exp.residual", &host(a.matmul(b).inner().transpose()), 1e-5)?;
    for (name, which) in [("exp.reg_identity", Regulariser::Identity), ("exp.reg_orthogonal", Regulariser::Orthogonal)]
    {
        near(case, name, &host(tlora.distance(which).inner()), 1e-5)?;
    }
    if regulariser != "none" {
        let sum = penalty(&weighted, PenaltyAt::Loss).ok_or("the structure has no penalty")?;
        near(case, "exp.reg", &host(sum.clone().inner()), 1e-5)?;
        gradients(case, &weighted, GradientsParams::from_grads(sum.backward(), &weighted), "exp.reg_grad")?;
    }
    common(case, &config, &GivenTensors::new())
}

pub fn loca(case: &Case) -> Outcome {
    let rate = |key: &str| case.config["train"][key].as_f64().ok_or_else(|| format!("configuration: train.{key}"));
    let config = AdapterConfig::new("loca")
        .with_option("n_components", case.count("n_components")?)
        .with_option("scale", case.number("scale")?)
        .with_option("coef_steps", case.count("coef_steps")?)
        .with_option("loc_steps", case.count("loc_steps")?)
        .with_option("learn_location_iters", case.count("learn_location_iters")?)
        .with_option("loc_lr_scale", rate("lr_loc")? / rate("lr_coef")?);
    if case.number("loc_clip")? != 0.999 {
        return Err(format!("configuration: loc_clip is {}", case.config["loc_clip"]));
    }
    let AnyStructure::Loca(loca) = adapter(&bench(case, &config, &GivenTensors::new())?).structure else {
        return Err(wrong("loca"));
    };
    let pixels = loca.pixels();
    let sides = [case.count("d_out")?, case.count("d_in")?];
    let of_side = |side: usize| pixels.iter().map(move |pixel| pixel[side] as f32);
    near(case, "exp.pixel_loc", &of_side(0).chain(of_side(1)).collect::<Vec<_>>(), 1e-6)?;

    // The slopes before the sides' lengths: of the same pixels, from places that may all be learned.
    let inside = |side: usize| {
        let last = sides[side] as f32 - 1.0;
        of_side(side).map(move |pixel| if last == 0.0 { 0.5 } else { pixel.max(0.1).min(last - 0.4) / last })
    };
    let places: Vec<f32> = inside(0).chain(inside(1)).collect();
    let coef = case.array("p.coef")?.f32();
    let [_, mut slopes] = loca_slopes(case, &config, coef, places)?;
    for (side, slopes) in slopes.chunks_mut(pixels.len()).enumerate() {
        slopes.iter_mut().for_each(|slope| *slope /= (sides[side] as f32 - 1.0).max(1.0));
    }
    near(case, "exp.grad.pixel", &slopes, 1e-5)?;

    // The slopes of one cosine in every place are the transform of the update's gradient.
    let [rows, columns] = sides;
    let share = |number: usize, side: usize| number as f32 / (side as f32 - 1.0).max(1.0);
    let all = (0..rows * columns).map(|place| share(place / columns, rows));
    let all = all.chain((0..rows * columns).map(|place| share(place % columns, columns))).collect();
    let full = config.clone().with_option("n_components", rows * columns);
    let [slopes, _] = loca_slopes(case, &full, vec![0.0; rows * columns], all)?;
    near(case, "exp.dct_of_grad", &slopes, 1e-5)?;
    common(case, &config, &GivenTensors::new())
}

/// Gradients of coefficients and places at given ones.
fn loca_slopes(case: &Case, config: &AdapterConfig, coef: Vec<f32>, places: Vec<f32>) -> Result<[Vec<f32>; 2], String> {
    let n = coef.len();
    let tensors = GivenTensors::from([
        ("coef".to_string(), TensorData::new(coef, [n])),
        ("loc".to_string(), TensorData::new(places, [2, n])),
    ]);
    let bench = attached(case, config, tensors)?;
    let input = |name: &str| -> Result<Tensor<2>, String> { Ok(case.array(name)?.tensor::<2>().autodiff()) };
    let grads = (bench.output(input("in.x")?) * input("in.grad_y")?).sum().backward();
    let mut grads = GradientsParams::from_grads(grads, &bench);
    let mut slopes = |field: &str| -> Result<Vec<f32>, String> {
        let tensors = adapter(&bench).shapes();
        let tensor = tensors.iter().find(|tensor| tensor.field == field).ok_or_else(|| wrong("loca"))?;
        slope(&mut grads, tensor)
    };
    Ok([slopes("coef")?, slopes("loc")?])
}
