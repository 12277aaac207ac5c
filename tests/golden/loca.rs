//! LoCA against reference values.

use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::adapter::{AdapterConfig, GivenTensors, Loca};

use super::support::bases::{bench, wrong};
use super::support::bench::{adapter, attached, common, gradient, near};
use super::support::case::{Case, Outcome};

pub fn run(case: &Case) -> Outcome {
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
    let adapter = adapter(&bench(case, &config, &GivenTensors::new())?);
    let loca = adapter.structure.downcast_ref::<Loca>().ok_or_else(|| wrong("loca"))?;
    let pixels = loca.pixels();
    let sides = [case.count("d_out")?, case.count("d_in")?];
    let of_side = |side: usize| pixels.iter().map(move |pixel| pixel[side] as f32);
    near(case, "exp.pixel_loc", &of_side(0).chain(of_side(1)).collect::<Vec<_>>(), 1e-6)?;

    // The gradients before the sides' lengths: of the same pixels, from places that may all be learned.
    let inside = |side: usize| {
        let last = sides[side] as f32 - 1.0;
        of_side(side).map(move |pixel| if last == 0.0 { 0.5 } else { pixel.max(0.1).min(last - 0.4) / last })
    };
    let places: Vec<f32> = inside(0).chain(inside(1)).collect();
    let coef = case.array("p.coef")?.f32();
    let [_, mut gradients] = loca_slopes(case, &config, coef, places)?;
    for (side, gradients) in gradients.chunks_mut(pixels.len()).enumerate() {
        gradients.iter_mut().for_each(|gradient| *gradient /= (sides[side] as f32 - 1.0).max(1.0));
    }
    near(case, "exp.grad.pixel", &gradients, 1e-5)?;

    // The gradients of one cosine in every place are the transform of the update's gradient.
    let [rows, columns] = sides;
    let share = |number: usize, side: usize| number as f32 / (side as f32 - 1.0).max(1.0);
    let all = (0..rows * columns).map(|place| share(place / columns, rows));
    let all = all.chain((0..rows * columns).map(|place| share(place % columns, columns))).collect();
    let full = config.clone().with_option("n_components", rows * columns);
    let [gradients, _] = loca_slopes(case, &full, vec![0.0; rows * columns], all)?;
    near(case, "exp.dct_of_grad", &gradients, 1e-5)?;
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
    let mut gradients = |field: &str| -> Result<Vec<f32>, String> {
        let tensors = adapter(&bench).shapes();
        let tensor = tensors.iter().find(|tensor| tensor.field == field).ok_or_else(|| wrong("loca"))?;
        gradient(&mut grads, tensor)
    };
    Ok([gradients("coef")?, gradients("loc")?])
}
