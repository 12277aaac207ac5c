//! Muon, Trion, Dion and 8-bit AdamW against the authors' code.

use burn::optim::Optimizer;
use burn::tensor::{Device, Tensor};
use lowrank_optim::{
    AdamW8bitConfig, Coefficients, DctBasis, DionConfig, DynamicMap, MatrixRule, MomentumRule, MuonConfig, Place,
    Scaling, TrionConfig, dequantise, newton_schulz, quantise,
};

use super::case::{Array, Case, Outcome, host};

const COEFFICIENTS: &[(&str, Coefficients)] = &[("jordan", Coefficients::Jordan), ("varying", Coefficients::Varying)];

const SCALINGS: &[(&str, Scaling)] = &[
    ("kj", Scaling::Kj),
    ("spectral", Scaling::Spectral),
    ("dion", Scaling::Spectral),
    ("rms", Scaling::Rms),
    ("kimi", Scaling::Rms),
    ("none", Scaling::None),
];

const PLACE: Place = Place { key: 0, number: 0, count: 1 };

pub fn muon(case: &Case) -> Outcome {
    let coefficients = case.choice("ns", COEFFICIENTS)?;
    if case.has("x") {
        let steps = case.array("coefficients")?.shape[0];
        let y = newton_schulz(case.array("x")?.tensor(), steps, coefficients, false);
        let worst = case.array("y")?.near("y", &host(y), 1e-5, 0.0)?;
        return Ok(format!("within {worst:.1e}"));
    }
    let rules = [("ema", MomentumRule::Ema), ("heavy_ball", MomentumRule::HeavyBall)];
    let config = MuonConfig::new()
        .with_momentum(case.number("mu")?)
        .with_momentum_rule(case.choice("momentum_rule", &rules)?)
        .with_nesterov(case.flag("nesterov")?)
        .with_ns_steps(case.count("ns_steps")?)
        .with_coefficients(coefficients)
        .with_scaling(case.choice("scaling", SCALINGS)?)
        .with_rows_are_outputs(true)
        .with_weight_decay(case.number("weight_decay")?);
    let rule = config.build().rule().clone();
    steps(case, &rule, |state, step| {
        let momentum = case.array("momentum")?.at(step);
        momentum.near("momentum", &host(state.momentum.clone()), 1e-6, 1e-5).map(|_| ())
    })
}

pub fn trion(case: &Case) -> Outcome {
    let mut remark = String::new();
    for fft in [lowrank_optim::Transform::Matmul, lowrank_optim::Transform::Fft] {
        let config = TrionConfig::new(case.count("rank")?)
            .with_momentum(case.number("mu")?)
            .with_basis(case.choice("basis", &[("dct3", DctBasis::Dct3), ("dct2", DctBasis::Dct2)])?)
            .with_transform(fft)
            .with_coefficients(case.choice("ns", COEFFICIENTS)?)
            .with_scaling(case.choice("scaling", SCALINGS)?)
            .with_rows_are_outputs(true)
            .with_weight_decay(case.number("weight_decay")?);
        let rule = config.build().rule().clone();
        // The momentum shows which columns were taken: these alone have decayed.
        remark = steps(case, &rule, |state, step| {
            let momentum = case.array("momentum")?.at(step);
            near_largest(&momentum, "momentum", host(state.momentum.clone()))
        })?;
    }
    Ok(remark)
}

pub fn dion(case: &Case) -> Outcome {
    let config = DionConfig::new()
        .with_rank(case.count("rank")?)
        .with_momentum(case.number("mu")?)
        .with_power_iters(case.count("power_iters")?)
        .with_norm_epsilon(case.number("eps")?)
        .with_rows_are_outputs(true)
        .with_weight_decay(case.number("weight_decay")?);
    let rule = config.build().rule().clone();
    let (grads, rates, w0) = (case.array("grads")?, case.array("lr")?, case.array("w0")?);
    let mut w = w0.tensor::<2>();
    let mut state = rule.fresh([w0.shape[0], w0.shape[1]], PLACE, &Device::default());
    state.q = case.array("q0")?.tensor();
    let mut worst = 0f64;
    for step in 0..grads.shape[0] {
        (w, state) = rule.step(rates.values[step], w, grads.at(step).tensor(), state);
        worst = worst.max(case.array("w")?.at(step).near(
            &format!("w at step {}", step + 1),
            &host(w.clone()),
            5e-6,
            0.0,
        )?);
        near_largest(&case.array("momentum")?.at(step), "momentum", host(state.momentum.clone()))?;
        case.array("q")?.at(step).near("q", &host(state.q.clone()), 2e-5, 0.0)?;
    }
    Ok(format!("weights within {worst:.1e}"))
}

fn near_largest(expected: &Array, what: &str, ours: Vec<f32>) -> Result<(), String> {
    expected.near(what, &ours, 1e-5 * expected.largest(), 0.0).map(|_| ())
}

fn steps<R: MatrixRule>(case: &Case, rule: &R, compare: impl Fn(&R::State, usize) -> Result<(), String>) -> Outcome {
    let (grads, rates, weights, w0) = (case.array("grads")?, case.array("lr")?, case.array("w")?, case.array("w0")?);
    let mut w: Tensor<2> = w0.tensor();
    let mut state = rule.fresh([w0.shape[0], w0.shape[1]], PLACE, &Device::default());
    let mut worst = 0f64;
    for step in 0..grads.shape[0] {
        (w, state) = rule.step(rates.values[step], w, grads.at(step).tensor(), state);
        compare(&state, step).map_err(|error| format!("{error} at step {}", step + 1))?;
        let near = weights.at(step).near(&format!("w at step {}", step + 1), &host(w.clone()), 5e-6, 1e-6)?;
        worst = worst.max(near);
    }
    Ok(format!("weights within {worst:.1e}"))
}

pub fn adamw_8bit(case: &Case) -> Outcome {
    if case.has("signed") {
        for (name, map) in [("signed", DynamicMap::signed()), ("unsigned", DynamicMap::unsigned())] {
            case.array(name)?.near(name, map.values(), 1e-12, 1e-7)?;
        }
        return Ok("both maps are equal".into());
    }
    if case.has("x") {
        return blocks(case);
    }
    let config = AdamW8bitConfig::new()
        .with_block(case.count("block")?)
        .with_min_8bit_size(0)
        .with_decay_before(case.choice("decay_order", &[("after", false), ("before", true)])?)
        .with_beta_1(case.number("beta1")?)
        .with_beta_2(case.number("beta2")?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay")?);
    let optimizer = config.build();
    let (grads, rates, weights) = (case.array("grads")?, case.array("lr")?, case.array("w")?);
    let mut w: Tensor<2> = case.array("w0")?.tensor();
    let (mut state, mut worst) = (None, 0f64);
    for step in 0..grads.shape[0] {
        (w, state) = optimizer.step(rates.values[step], w, grads.at(step).tensor(), state);
        let name = |part: &str| format!("{part} at step {}", step + 1);
        worst = worst.max(weights.at(step).near(&name("w"), &host(w.clone()), 1e-5, 0.0)?);
        let state = state.as_ref().ok_or("no state is kept")?;
        for (moment, codes, largest) in [(&state.moment_1, "codes1", "absmax1"), (&state.moment_2, "codes2", "absmax2")]
        {
            let blocks = moment.as_ref().and_then(|moment| moment.blocks()).ok_or("no codes are kept")?;
            let ours = blocks.codes.to_data().convert::<i32>().try_into_vec::<i32>().expect("codes");
            if ours != case.array(codes)?.at(step).i32() {
                return Err(format!("{} differ", name(codes)));
            }
            case.array(largest)?.at(step).near(&name(largest), &host(blocks.largest.clone()), 1e-9, 1e-5)?;
        }
    }
    Ok(format!("codes equal, weights within {worst:.1e}"))
}

fn blocks(case: &Case) -> Outcome {
    let block = case.count("block")?;
    for (map, end) in [(DynamicMap::signed(), ""), (DynamicMap::unsigned(), "_nonneg")] {
        let name = |part: &str| format!("{part}{end}");
        let x = case.array(&name("x"))?.f32();
        let (codes, largest) = quantise(map, &x, block, false);
        let expected = case.array(&name("codes"))?.i32();
        if let Some(place) = codes.iter().zip(&expected).position(|(ours, code)| i32::from(*ours) != *code) {
            return Err(format!("{}[{place}] is {} instead of {}", name("codes"), codes[place], expected[place]));
        }
        case.array(&name("absmax"))?.near(&name("absmax"), &largest, 0.0, 1e-7)?;
        let restored = dequantise(map, &codes, &largest, block);
        case.array(&name("dequantized"))?.near(&name("dequantized"), &restored, 1e-9, 1e-6)?;
    }
    Ok("codes equal".into())
}
