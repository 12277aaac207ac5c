//! Lambda-orthogonality against reference values: the penalty, the strict map, and the alignment of two models.

use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_models::Dense;
use lowrank_models::adapter::{LambdaOrthogonality, MatrixPenalty};
use lowrank_models::alignment::{
    AlignmentLoss, AlignmentMaps, Backward, BackwardKind, LossWeights, Rotation, backfilling_order, centre_distances,
};
use lowrank_optim::AdamWConfig;

use super::support::bench::near;
use super::support::case::{Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    if case.has("upper") {
        return rotation(case);
    }
    if case.has("init.B.weight") { alignment(case) } else { penalty(case) }
}

fn settings(case: &Case) -> Result<LambdaOrthogonality, String> {
    Ok(LambdaOrthogonality { lambda: case.number("lam")?, alpha: case.number("alpha")?, weight: 1.0 })
}

/// The penalty on a matrix as files have it, and on its transpose, which is how it lies in memory.
fn penalty(case: &Case) -> Outcome {
    let settings = settings(case)?;
    let w = case.array("W")?.tensor::<2>();
    for stored in [false, true] {
        let turned = |matrix: Tensor<2>| if stored { matrix.transpose() } else { matrix };
        let w = turned(w.clone()).autodiff().require_grad();
        let defect = LambdaOrthogonality::defect(w.clone());
        near(case, "defect_norm", &host(defect.clone()), 1e-5)?;
        let hard = if host(defect.clone())[0] as f64 >= settings.lambda { host(defect)[0] } else { 0.0 };
        near(case, "loss_hard_step", &[hard], 1e-5)?;
        let loss = settings.of(w.clone()).ok_or("the penalty is off")?;
        near(case, "loss", &host(loss.clone()), 1e-5)?;
        let mut grads = loss.backward();
        let grad = w.grad_remove(&mut grads).ok_or("the matrix has no gradient")?;
        near(case, "grad_W", &host(turned(grad)), 1e-5)?;
    }
    Ok("value and gradient are equal".into())
}

fn rotation(case: &Case) -> Outcome {
    let map = Rotation::from_upper(case.array("upper")?.tensor::<1>().autodiff().require_grad(), case.count("n")?);
    near(case, "skew", &host(map.skew()), 1e-6)?;
    near(case, "Q", &host(map.matrix()), 1e-5)?;
    let h = case.array("h")?.tensor::<2>().autodiff();
    let error = map.forward(h) - case.array("target")?.tensor::<2>().autodiff();
    let loss = error.square().sum_dim(1).mean();
    near(case, "loss", &host(loss.clone()), 1e-5)?;
    let mut grads = GradientsParams::from_grads(loss.backward(), &map);
    let grad = grads.remove::<1>(map.upper.id).ok_or("the map has no gradient")?;
    near(case, "grad_upper", &host(grad), 1e-5)?;
    Ok("matrix and gradient are equal".into())
}

fn alignment(case: &Case) -> Outcome {
    let affine = |name: &str| -> Result<Dense, String> {
        let weight = case.array(&format!("init.{name}.weight"))?.tensor::<2>().transpose();
        let bias = case.array(&format!("init.{name}.bias"))?.tensor::<1>();
        Ok(Dense::from_parts(weight.autodiff(), Some(bias.autodiff())))
    };
    let sizes = [case.count("d_old")?, case.count("d_new")?];
    let mut maps = AlignmentMaps::new(BackwardKind::Affine, sizes, &Default::default());
    maps.backward = Backward::Affine(affine("B")?);
    maps.forward = affine("F")?;
    let weights = &case.config["w"];
    let weight = |place: usize| weights[place].as_f64().ok_or_else(|| format!("configuration: w is {weights}"));
    let loss = AlignmentLoss {
        weights: LossWeights { forward: weight(0)?, backward: weight(1)?, contrastive: weight(2)? },
        temperature: case.number("temperature")?,
        penalty: settings(case)?,
    };
    let mut optimizer = AdamWConfig::new().init();
    let mut steps = 0;
    let mut last = None;
    while case.has(&format!("step{steps}.h_old")) {
        let of = |name: &str| format!("step{steps}.{name}");
        let [old, new] = ["h_old", "h_new"].map(|name| case.array(&of(name)));
        let [old, new] = [old?.tensor::<2>().autodiff(), new?.tensor::<2>().autodiff()];
        let labels = case.array(&of("labels"))?.i32();
        let parts = loss.parts(&maps, old.clone(), new, Some(&labels));
        near(case, &of("loss_forward"), &host(parts.forward.clone()), 1e-5)?;
        near(case, &of("loss_backward"), &host(parts.backward.clone()), 1e-5)?;
        near(case, &of("loss_contrastive"), &host(parts.contrastive.clone()), 1e-5)?;
        near(case, &of("loss_reg"), &host(parts.penalty.clone().ok_or("the penalty is off")?), 1e-5)?;
        let Backward::Affine(map) = &maps.backward else { return Err("the map is affine".into()) };
        near(case, &of("defect_norm"), &host(LambdaOrthogonality::defect(map.weight.val())), 1e-5)?;
        let sum = loss.sum(&parts);
        near(case, &of("loss"), &host(sum.clone()), 1e-5)?;
        let grads = GradientsParams::from_grads(sum.backward(), &maps);
        let tensors = |maps: &AlignmentMaps| -> Vec<(&'static str, Dense)> {
            let Backward::Affine(map) = &maps.backward else { return Vec::new() };
            vec![("B", map.clone()), ("F", maps.forward.clone())]
        };
        for (name, map) in tensors(&maps) {
            let bias = map.bias.as_ref().ok_or("the map has no bias")?;
            let weight = grads.get::<2>(map.weight.id).ok_or("a weight has no gradient")?;
            let of_bias = grads.get::<1>(bias.id).ok_or("a bias has no gradient")?;
            near(case, &of(&format!("grad.{name}.weight")), &host(weight.transpose()), 1e-5)?;
            near(case, &of(&format!("grad.{name}.bias")), &host(of_bias), 1e-5)?;
        }
        maps = optimizer.step(case.number("lr")?, maps, grads);
        for (name, map) in tensors(&maps) {
            let bias = map.bias.as_ref().ok_or("the map has no bias")?;
            near(case, &of(&format!("param.{name}.weight")), &host(map.weight.val().transpose()), 1e-4)?;
            near(case, &of(&format!("param.{name}.bias")), &host(bias.val()), 1e-4)?;
        }
        last = Some((old, labels));
        steps += 1;
    }
    let (old, labels) = last.ok_or("the case has no step")?;
    if case.has("backfill.order") {
        let distances = centre_distances(maps.old_in_new(old), &labels);
        let values: Vec<f32> = distances.iter().map(|distance| *distance as f32).collect();
        near(case, "backfill.distance", &values, 1e-4)?;
        let order: Vec<i32> = backfilling_order(&distances).into_iter().map(|item| item as i32).collect();
        let expected = case.array("backfill.order")?.i32();
        if order != expected {
            return Err(format!("backfilling in the order {order:?} instead of {expected:?}"));
        }
    }
    Ok(format!("losses, gradients and {steps} steps are equal"))
}
