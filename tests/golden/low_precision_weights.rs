//! Weights and moments in few bytes against reference values.

use burn::optim::Optimizer;
use burn::tensor::{DType, Device, Tensor, TensorData, bf16};
use lowrank_optim::narrow::bf16::{STEPS_8, STEPS_16, corrected, joined, nearest, stochastic, widened};
use lowrank_optim::narrow::companded::{Companding, GROUP, decoded, encoded};
use lowrank_optim::narrow::draws::{Draws, Stream, philox};
use lowrank_optim::narrow::groups::{QuantisedGroups, Rounding, quantise_groups};
use lowrank_optim::narrow::packed::{Codes, PackedMatrix};
use lowrank_optim::{
    AdamW8bitConfig, AdamW8bitState, AdamWConfig, AdamWState, Moment, MomentCodes, Narrow, NarrowState, WeightChange,
    WeightStorage, key_of, requantised, stored,
};

use super::support::case::{Array, Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    if case.has("counters") || case.has("draws16") || case.has("draws24") {
        return draws(case);
    }
    if case.has("stochastic") || case.has("nearest") {
        return rounding(case);
    }
    if case.has("deltas") {
        return int8(case);
    }
    if case.has("m_restored") || case.has("v_restored") {
        return moments(case);
    }
    adamw(case)
}

const STORAGES: &[(&str, WeightStorage)] = &[
    ("f32", WeightStorage::F32),
    ("bf16", WeightStorage::Bf16Nearest),
    ("bf16_stochastic", WeightStorage::Bf16),
    ("bf16_kahan", WeightStorage::Bf16Kahan),
    ("bf16_plus_8", WeightStorage::Bf16Plus8),
    ("bf16_plus_16", WeightStorage::Bf16Plus16),
];

fn equal(what: &str, ours: impl IntoIterator<Item = i64>, expected: &Array) -> Result<(), String> {
    let ours: Vec<i64> = ours.into_iter().collect();
    if ours.len() != expected.values.len() {
        return Err(format!("{what}: {} values instead of {}", ours.len(), expected.values.len()));
    }
    match ours.iter().zip(&expected.values).position(|(ours, expected)| *ours as f64 != *expected) {
        None => Ok(()),
        Some(place) => Err(format!("{what}[{place}] is {} instead of {}", ours[place], expected.values[place])),
    }
}

/// Values bit by bit, but for the sign of zero.
fn exact(what: &str, ours: &[f32], expected: &Array) -> Result<(), String> {
    expected.near(what, ours, 0.0, 0.0).map(|_| ())
}

/// A whole number of the configuration, which may be larger than a JSON number holds.
fn whole(value: &serde_json::Value) -> Result<u64, String> {
    let text = value.as_str().and_then(|text| text.parse().ok());
    text.or_else(|| value.as_u64()).ok_or_else(|| format!("configuration: {value} is no whole number"))
}

fn list<'a>(case: &'a Case, key: &str) -> Result<&'a Vec<serde_json::Value>, String> {
    case.config[key].as_array().ok_or_else(|| format!("configuration: {key} is no list"))
}

fn drawn(stream: Stream, seed: u64, step: u64, key: u64, count: usize) -> Vec<i64> {
    let draws = Draws::new(seed, stream, step as u32, key);
    match stream {
        Stream::Sixteen => {
            let mut all = vec![0; count];
            draws.sixteen(0, &mut all);
            all.into_iter().map(i64::from).collect()
        }
        Stream::TwentyFour => {
            let mut all = vec![0; count];
            draws.twenty_four(0, &mut all);
            all.into_iter().map(i64::from).collect()
        }
    }
}

fn draws(case: &Case) -> Outcome {
    if case.has("counters") {
        let (counters, keys) = (case.array("counters")?, case.array("keys")?);
        for row in 0..counters.shape[0] {
            let word = |array: &Array, at: usize| array.at(row).values[at] as u32;
            let counter = std::array::from_fn(|at| word(&counters, at));
            let ours = philox(counter, [word(&keys, 0), word(&keys, 1)]);
            equal("outputs", ours.map(i64::from), &case.array("outputs")?.at(row))?;
        }
    }
    let (paths, seeds, steps) = (list(case, "parameters")?, list(case, "seeds")?, list(case, "steps")?);
    for (number, ((path, seed), step)) in paths.iter().zip(seeds).zip(steps).enumerate() {
        let key = key_of(path.as_str().ok_or("configuration: a path is a text")?);
        if let Some(keys) = case.config["parameter_keys"].as_array()
            && whole(&keys[number])? != key
        {
            return Err(format!("the key of {path} is {key} instead of {}", keys[number]));
        }
        for (name, stream) in [("draws16", Stream::Sixteen), ("draws24", Stream::TwentyFour)] {
            if case.has(name) {
                let expected = case.array(name)?.at(number);
                let ours = drawn(stream, whole(seed)?, whole(step)?, key, expected.values.len());
                equal(&format!("{name} of {path}"), ours, &expected)?;
            }
        }
    }
    Ok("all draws are equal".into())
}

fn rounding(case: &Case) -> Outcome {
    let x = case.array("x")?.f32();
    if case.has("stochastic") {
        let draws = case.array("draws")?.i32();
        let ours: Vec<f32> = x.iter().zip(draws).map(|(x, draw)| widened(stochastic(*x, draw as u16))).collect();
        exact("stochastic", &ours, &case.array("stochastic")?)?;
    }
    if case.has("nearest") {
        let expected = case.array("nearest")?;
        let ours: Vec<f32> = x[..expected.values.len()].iter().map(|x| widened(nearest(*x))).collect();
        exact("nearest", &ours, &expected)?;
    }
    for (code, whole, steps) in [("error8", "joined8", STEPS_8), ("error16", "joined16", STEPS_16)] {
        if !case.has(code) {
            continue;
        }
        let expected = case.array(code)?;
        let ours: Vec<(u16, i16)> = x[..expected.values.len()].iter().map(|x| corrected(*x, steps)).collect();
        equal(code, ours.iter().map(|(_, code)| i64::from(*code)), &expected)?;
        let ours: Vec<f32> = ours.iter().map(|(value, code)| joined(*value, *code, steps)).collect();
        case.array(whole)?.near(whole, &ours, 0.0, 1e-6)?;
    }
    Ok("all values and codes are equal".into())
}

fn signed(codes: &[u8]) -> impl Iterator<Item = i64> {
    codes.iter().map(|code| i64::from(*code as i8))
}

fn plain(codes: &[u8]) -> impl Iterator<Item = i64> {
    codes.iter().map(|code| i64::from(*code))
}

fn moments(case: &Case) -> Outcome {
    let group = case.count("group")?;
    if group != GROUP {
        return Err(format!("configuration: group is {group}; companded moments have groups of {GROUP}"));
    }
    for (name, kind) in [("m", Companding::Signed), ("v", Companding::Root)] {
        let part = |end: &str| format!("{name}_{end}");
        let (codes, scales) = encoded(kind, &case.array(name)?.f32());
        match kind {
            Companding::Signed => equal(&part("codes"), signed(&codes), &case.array(&part("codes"))?)?,
            Companding::Root => equal(&part("codes"), plain(&codes), &case.array(&part("codes"))?)?,
        }
        let wide: Vec<f32> = scales.iter().map(|scale| scale.to_f32()).collect();
        exact(&part("scales"), &wide, &case.array(&part("scales"))?)?;
        case.array(&part("restored"))?.near(&part("restored"), &decoded(kind, &codes, &scales), 0.0, 1e-6)?;
    }
    Ok("codes and scales are equal".into())
}

fn int8(case: &Case) -> Outcome {
    let (group, w0) = (case.count("group")?, case.array("w0")?);
    let (seed, key) = (whole(&case.config["seed"])?, key_of(case.word("parameter")?));
    let compare = |groups: &QuantisedGroups, [codes, scales, zeros]: [Array; 3]| -> Result<(), String> {
        equal("codes", plain(&groups.codes), &codes)?;
        exact("scales", &groups.scales, &scales)?;
        exact("zeros", &groups.zeros, &zeros)
    };
    let groups = quantise_groups(&w0.f32(), 8, group, Rounding::Nearest);
    compare(&groups, [case.array("codes_start")?, case.array("scales_start")?, case.array("zeros_start")?])?;
    let mut matrix =
        PackedMatrix { shape: [1, w0.values.len()], transposed: false, codes: Codes::Groups(groups, group) };
    let deltas = case.array("deltas")?;
    for step in 0..deltas.shape[0] {
        let draws = Draws::new(seed, Stream::TwentyFour, step as u32 + 1, key);
        if case.has("draws") {
            let expected = case.array("draws")?.at(step);
            let ours = drawn(Stream::TwentyFour, seed, step as u64 + 1, key, expected.values.len());
            equal("draws", ours, &expected)?;
        }
        let changed: Vec<f32> =
            matrix.restored().iter().zip(deltas.at(step).f32()).map(|(value, delta)| value + delta).collect();
        matrix = requantised(matrix, &changed, draws);
        let Codes::Groups(groups, _) = &matrix.codes else { return Err("8-bit codes became others".into()) };
        let at = |name: &str| case.array(name).map(|array| array.at(step));
        compare(groups, [at("codes")?, at("scales")?, at("zeros")?])
            .map_err(|error| format!("{error} at step {}", step + 1))?;
        at("restored")?.near("restored", &matrix.restored(), 0.0, 1e-6)?;
    }
    Ok("codes, scales and zeros are equal".into())
}

fn adamw(case: &Case) -> Outcome {
    let companded = match case.config["moments"].as_str() {
        Some("companded") => true,
        Some("f32") | None => false,
        Some(other) => return Err(format!("configuration: moments is \"{other}\"")),
    };
    let storage = case.choice("weights", STORAGES)?;
    let (beta_1, beta_2) = (case.number("beta1")?, case.number("beta2")?);
    let (epsilon, decay) = (case.number("eps")?, case.number("weight_decay")?);
    if companded {
        let config = AdamW8bitConfig::new()
            .with_codes(MomentCodes::Companded)
            .with_min_8bit_size(0)
            .with_decay_before(true)
            .with_beta_1(beta_1)
            .with_beta_2(beta_2)
            .with_epsilon(epsilon)
            .with_weight_decay(decay);
        let compare = |state: &AdamW8bitState<2>, step: usize| -> Result<(), String> {
            let codes = |moment: &Option<Moment<2>>| -> Result<(Vec<u8>, Vec<f32>), String> {
                let blocks = moment.as_ref().and_then(Moment::blocks).ok_or("no codes are kept")?;
                let codes = blocks.codes.to_data().try_into_vec::<u8>().map_err(|error| format!("{error:?}"))?;
                Ok((codes, host(blocks.largest.clone())))
            };
            let (m, m_scales) = codes(&state.moment_1)?;
            let (v, v_scales) = codes(&state.moment_2)?;
            equal("m_codes", signed(&m), &case.array("m_codes")?.at(step))?;
            equal("v_codes", plain(&v), &case.array("v_codes")?.at(step))?;
            exact("m_scales", &m_scales, &case.array("m_scales")?.at(step))?;
            exact("v_scales", &v_scales, &case.array("v_scales")?.at(step))
        };
        return steps(case, config.build(), storage, compare);
    }
    let config =
        AdamWConfig::new().with_beta_1(beta_1).with_beta_2(beta_2).with_epsilon(epsilon).with_weight_decay(decay);
    let compare = |state: &AdamWState<2>, step: usize| -> Result<(), String> {
        for (name, moment) in [("m", &state.moment_1), ("v", &state.moment_2)] {
            case.array(name)?.at(step).near(name, &host(moment.clone()), 1e-7, 1e-6)?;
        }
        Ok(())
    };
    steps(case, config.build(), storage, compare)
}

/// A trajectory of weights in a storage: weights and corrections are equal at every step.
fn steps<O: WeightChange>(
    case: &Case,
    optimizer: O,
    storage: WeightStorage,
    compare: impl Fn(&O::State<2>, usize) -> Result<(), String>,
) -> Outcome {
    let seed = if case.config["seed"].is_null() { 0 } else { whole(&case.config["seed"])? };
    let key = case.config["parameter"].as_str().map_or(0, key_of);
    let (grads, rates, weights, w0) = (case.array("grads")?, case.array("lr")?, case.array("w")?, case.array("w0")?);
    let shape = [w0.shape[0], w0.shape[1]];
    let device = Device::default();
    let optimizer = Narrow::new(optimizer, storage, seed, key);
    let (mut w, mut state): (Tensor<2>, _) = match storage {
        WeightStorage::F32 => (w0.tensor(), None),
        _ => {
            let (values, corrections) = stored(&w0.f32(), storage);
            if case.has("w_start") {
                let wide: Vec<f32> = values.iter().map(|x: &bf16| x.to_f32()).collect();
                exact("w_start", &wide, &case.array("w_start")?)?;
            }
            if case.has("error_start") {
                equal("error_start", errors(storage, &corrections), &case.array("error_start")?)?;
            }
            let w = Tensor::from_data(TensorData::new(values, shape), (&device, DType::BF16));
            // A compensation begins at zero.
            let corrections = if storage == WeightStorage::Bf16Kahan { Vec::new() } else { corrections };
            (w, Some(NarrowState::of(corrections, &device)))
        }
    };
    for step in 0..grads.shape[0] {
        if case.has("draws") && storage == WeightStorage::Bf16 {
            let expected = case.array("draws")?.at(step);
            let ours = drawn(Stream::Sixteen, seed, step as u64 + 1, key, expected.values.len());
            equal("draws", ours, &expected)?;
        }
        (w, state) = optimizer.step(rates.values[step], w, grads.at(step).tensor(), state);
        let at = |error: String| format!("{error} at step {}", step + 1);
        let ours = host(w.clone());
        match storage {
            WeightStorage::F32 => weights.at(step).near("w", &ours, 1e-7, 1e-6).map(|_| ()).map_err(at)?,
            _ => exact("w", &ours, &weights.at(step)).map_err(at)?,
        }
        let state = state.as_ref().ok_or("no state is kept")?;
        compare(state.inner.as_ref().ok_or("no moments are kept")?, step).map_err(at)?;
        let corrections = match &state.corrections {
            Some(bytes) => bytes.to_data().as_bytes().to_vec(),
            None => Vec::new(),
        };
        if case.has("error") {
            equal("error", errors(storage, &corrections), &case.array("error")?.at(step)).map_err(at)?;
        }
        if case.has("compensation") {
            let expected = case.array("compensation")?.at(step);
            for (place, (ours, expected)) in corrections.as_chunks::<2>().0.iter().zip(&expected.values).enumerate() {
                let ours = f64::from(widened(u16::from_le_bytes(*ours)));
                let bound = weights.at(step).values[place].abs() * 2f64.powi(-17);
                if (ours - expected).abs() > bound {
                    return Err(at(format!("compensation[{place}] is {ours} instead of {expected}")));
                }
            }
        }
        if case.has("joined") {
            let width = corrections.len() / ours.len();
            let steps = if width == 1 { STEPS_8 } else { STEPS_16 };
            let codes = errors(storage, &corrections);
            let ours: Vec<f32> =
                ours.iter().zip(codes).map(|(w, code)| joined(nearest(*w), code as i16, steps)).collect();
            case.array("joined")?.at(step).near("joined", &ours, 1e-7, 1e-6).map_err(at)?;
        }
    }
    Ok("weights and corrections are equal at every step".into())
}

/// Corrections of 8 or 16 bits.
fn errors(storage: WeightStorage, corrections: &[u8]) -> Vec<i64> {
    match storage {
        WeightStorage::Bf16Plus16 => {
            corrections.as_chunks::<2>().0.iter().map(|bytes| i64::from(i16::from_le_bytes(*bytes))).collect()
        }
        _ => signed(corrections).collect(),
    }
}
