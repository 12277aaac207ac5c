//! 8-bit AdamW against reference values.

use burn::optim::Optimizer;
use burn::tensor::Tensor;
use lowrank_optim::AdamW8bitConfig;
use lowrank_optim::narrow::blocks::{DynamicMap, dequantise, quantise};

use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
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
