use super::*;
use std::collections::BTreeMap;

use burn::module::{Lora, ModuleMapper, ModuleVisitor};
use burn::nn::{Linear, LinearConfig};
use burn::optim::SgdConfig;

const MODES: [LoraProX; 3] = [LoraProX::Sylvester, LoraProX::Symmetry, LoraProX::Zero];

fn matrix(rows: usize, columns: usize, seed: u64) -> DMatrix<f64> {
    let mut rng = lowrank_kernels::random::generator(7, seed, 0);
    DMatrix::from_iterator(
        rows,
        columns,
        lowrank_kernels::random::normal(&mut rng, rows * columns).into_iter().map(f64::from),
    )
}

/// A, B and the gradient of the weight, in the orientation of the paper.
struct Case {
    a: DMatrix<f64>,
    b: DMatrix<f64>,
    g: DMatrix<f64>,
    scale: f64,
}

impl Case {
    fn new(d_out: usize, d_in: usize, rank: usize, scale: f64) -> Self {
        Self { a: matrix(rank, d_in, 1), b: matrix(d_out, rank, 2), g: matrix(d_out, d_in, 3), scale }
    }

    /// The gradients of the factors by the chain rule.
    fn plain(&self) -> [DMatrix<f64>; 2] {
        [self.b.transpose() * &self.g * self.scale, &self.g * self.a.transpose() * self.scale]
    }

    fn adjusted(&self, x_mode: LoraProX) -> [DMatrix<f64>; 2] {
        let [a, b] = self.plain();
        closed_form([&self.a, &self.b], [&a, &b], self.scale, 1e-8, x_mode).unwrap()
    }

    fn equivalent(&self, [a, b]: &[DMatrix<f64>; 2]) -> DMatrix<f64> {
        (&self.b * a + b * &self.a) * self.scale
    }
}

fn far(a: &DMatrix<f64>, b: &DMatrix<f64>) -> f64 {
    (a - b).norm() / b.norm()
}

/// The projector on the columns of a matrix.
fn onto(columns: &DMatrix<f64>) -> DMatrix<f64> {
    let q = columns.clone().qr().q();
    &q * q.transpose()
}

const SHAPES: [(usize, usize, usize, f64); 4] = [(12, 10, 3, 2.0), (7, 20, 1, 0.5), (20, 7, 5, 1.0), (6, 6, 2, 16.0)];

#[test]
fn the_equivalent_gradient_is_the_nearest_whatever_x_is() {
    for (d_out, d_in, rank, scale) in SHAPES {
        let case = Case::new(d_out, d_in, rank, scale);
        let (left, right) = (onto(&case.b), onto(&case.a.transpose()));
        let expected = &left * &case.g + &case.g * &right - &left * &case.g * &right;
        for x_mode in MODES {
            let gradients = case.adjusted(x_mode);
            assert!(far(&case.equivalent(&gradients), &expected) < 1e-5, "{x_mode:?}");
            let distance = |gradients: &[DMatrix<f64>; 2]| (case.equivalent(gradients) - &case.g).norm();
            let best = distance(&gradients);
            let [plain_a, plain_b] = case.plain();
            for step in 0..200 {
                let size = 10f64.powi(step % 5 - 3);
                let [a, b] = &gradients;
                let seed = 100 + step as u64;
                let other = [a + matrix(rank, d_in, seed) * size, b + matrix(d_out, rank, seed + 1000) * size];
                assert!(distance(&other) >= best * (1.0 - 1e-9));
                assert!(distance(&[&plain_a * size, &plain_b * size]) >= best * (1.0 - 1e-9));
            }
        }
    }
}

#[test]
fn sylvesters_gradients_are_the_nearest_to_the_plain_ones() {
    for (d_out, d_in, rank, scale) in SHAPES {
        let case = Case::new(d_out, d_in, rank, scale);
        let [plain_a, plain_b] = case.plain();
        let distance =
            |a: &DMatrix<f64>, b: &DMatrix<f64>| (a - &plain_a).norm_squared() + (b - &plain_b).norm_squared();
        let [a, b] = case.adjusted(LoraProX::Sylvester);
        // The gradient of the distance where X moves.
        let gradient = (&a - &plain_a) * case.a.transpose() - case.b.transpose() * (&b - &plain_b);
        let size = ((&a - &plain_a) * case.a.transpose()).norm() + (case.b.transpose() * &b).norm();
        assert!(gradient.norm() < 1e-5 * size, "{}", gradient.norm() / size);
        for x_mode in MODES {
            let [other_a, other_b] = case.adjusted(x_mode);
            assert!(distance(&a, &b) <= distance(&other_a, &other_b) * (1.0 + 1e-12));
        }
    }
}

#[test]
fn a_step_goes_down_and_does_not_depend_on_how_the_product_is_written() {
    for (d_out, d_in, rank, scale) in SHAPES {
        let case = Case::new(d_out, d_in, rank, scale);
        let [plain_a, plain_b] = case.plain();
        let equivalent = case.equivalent(&case.adjusted(LoraProX::Sylvester));
        for x_mode in MODES {
            let [a, b] = case.adjusted(x_mode);
            let gradient = plain_a.dot(&a) + plain_b.dot(&b);
            assert!(gradient >= 0.0 && (gradient - case.g.dot(&equivalent)).abs() < 1e-5 * gradient);
        }
        // (A, B) as (M A, B M^-1).
        let m = matrix(rank, rank, 9) + DMatrix::identity(rank, rank) * 3.0;
        let inverse = m.clone().try_inverse().unwrap();
        let other = Case { a: m * &case.a, b: &case.b * inverse, g: case.g.clone(), scale };
        assert!(far(&other.equivalent(&other.adjusted(LoraProX::Sylvester)), &equivalent) < 1e-4);
        // The scale, moved into B.
        let other = Case { a: case.a.clone(), b: &case.b / 3.0, g: case.g.clone(), scale: scale * 3.0 };
        assert!(far(&other.equivalent(&other.adjusted(LoraProX::Sylvester)), &equivalent) < 1e-4);
    }
}

#[test]
fn at_full_rank_the_equivalent_gradient_is_the_gradient() {
    for (d_out, d_in) in [(5, 8), (8, 5), (6, 6)] {
        let case = Case::new(d_out, d_in, 5.min(d_out), 2.0);
        let case = if d_out == 6 { Case::new(6, 6, 6, 2.0) } else { case };
        for x_mode in MODES {
            assert!(far(&case.equivalent(&case.adjusted(x_mode)), &case.g) < 1e-4);
        }
    }
}

#[test]
fn factors_that_do_not_reach_every_direction_give_finite_gradients() {
    let mut case = Case::new(12, 10, 3, 2.0);
    let first = case.a.row(0).clone_owned();
    case.a.set_row(1, &first);
    case.b.column_mut(2).fill(0.0);
    for (a, b) in [
        (case.a.clone(), case.b.clone()),
        (case.a.clone(), case.b.clone() * 0.0),
        (case.a.clone() * 0.0, case.b.clone()),
    ] {
        let case = Case { a, b, g: case.g.clone(), scale: 2.0 };
        for x_mode in MODES {
            let gradients = case.adjusted(x_mode);
            assert!(gradients.iter().flat_map(|x| x.iter()).all(|value| value.is_finite()));
            let distance = (case.equivalent(&gradients) - &case.g).norm();
            assert!(distance <= case.g.norm() * (1.0 + 1e-6), "{distance}");
        }
    }
}

// From here on, modules.

type Layer = Linear;

fn device() -> Device {
    Device::default().autodiff()
}

fn tensor_of(rows: usize, columns: usize, seed: u64) -> Tensor<2> {
    let values: Vec<f32> = matrix(columns, rows, seed).iter().map(|value| *value as f32).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::default())
}

/// Gives parameters other values, by id.
struct Set(BTreeMap<ParamId, Tensor<2>>);

impl ModuleMapper for Set {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(value) = self.0.remove(&param.id) else { return param };
        let shape: [usize; D] = value.dims().to_vec().try_into().unwrap();
        let trained = param.is_require_grad();
        let value = Tensor::from_inner(value).reshape(shape).detach();
        Param::initialized(param.id, if trained { value.require_grad() } else { value })
    }
}

/// A layer with an adapter whose B is zero, or not.
fn layer([d_in, d_out]: [usize; 2], rank: usize, alpha: f64, zero: bool) -> Layer {
    let layer = LinearConfig::new(d_in, d_out).with_bias(false).init(&device()).apply_lora(Lora::new(rank, alpha));
    let adapter = layer.weight.adapter().unwrap();
    let b = tensor_of(rank, d_out, 2);
    let values = BTreeMap::from([
        (layer.weight.id, tensor_of(d_in, d_out, 4).mul_scalar(0.3)),
        (adapter.a.id, tensor_of(d_in, rank, 1)),
        (adapter.b.id, if zero { b.zeros_like() } else { b }),
    ]);
    layer.map(&mut Set(values))
}

fn weight(layer: &Layer) -> Tensor<2> {
    layer.weight.val().without_autodiff()
}

fn factors(layer: &Layer) -> [Tensor<2>; 2] {
    let adapter = layer.weight.adapter().unwrap();
    [adapter.a.val().without_autodiff(), adapter.b.val().without_autodiff()]
}

fn host(x: Tensor<2>) -> Vec<f32> {
    lowrank_kernels::host::values(x)
}

fn distance(a: Tensor<2>, b: Tensor<2>) -> f32 {
    (a - b).square().sum().sqrt().into_scalar()
}

/// The gradients of `sum(g * weight)`.
fn gradients(layer: &Layer, g: &Tensor<2>) -> GradientsParams {
    let loss = (layer.weight.val() * Tensor::from_inner(g.clone())).sum();
    GradientsParams::from_grads(loss.backward(), layer)
}

fn descent(layer: Layer, rule: &LoraPro, g: &Tensor<2>, lr: f64) -> Layer {
    let grads = rule.apply(&layer, gradients(&layer, g)).unwrap();
    let layer = rule.decay(layer, lr);
    SgdConfig::new().init().step(lr, layer, grads)
}

#[test]
fn from_zero_the_first_step_moves_b_alone() {
    for mode in [LoraProMode::Full, LoraProMode::Efficient, LoraProMode::Sgd] {
        let before = layer([9, 7], 3, 6.0, true);
        let rule = LoraProConfig::new().with_mode(mode).init(&before).unwrap();
        let after = descent(before.clone(), &rule, &tensor_of(9, 7, 5), 1e-3);
        let ([a, b], [moved_a, moved_b]) = (factors(&before), factors(&after));
        assert_eq!(host(a), host(moved_a));
        assert!(host(moved_b.clone()).iter().all(|value| value.is_finite()) && distance(b, moved_b) > 0.0);
        // And so on from the tiny B.
        let after = descent(after, &rule, &tensor_of(9, 7, 6), 1e-3);
        assert!(factors(&after).into_iter().flat_map(host).all(|value| value.is_finite()));
    }
}

#[test]
fn at_full_rank_mode_full_follows_adam_on_the_weight() {
    let mut errors = Vec::new();
    for lr in [4e-2, 2e-2] {
        let mut ours = layer([6, 4], 4, 8.0, false);
        let rule = LoraProConfig::new().init(&ours).unwrap();
        let mut theirs = weight(&ours);
        let (adam, mut state) = (AdamWConfig::new().build(), None);
        for step in 0..4 {
            let g = tensor_of(6, 4, 20 + step);
            ours = descent(ours, &rule, &g, lr);
            (theirs, state) = burn::optim::Optimizer::step(&adam, lr, theirs, g, state);
        }
        errors.push(distance(weight(&ours), theirs));
    }
    println!("{errors:?}");
    // The remainder is of second order in the rate.
    assert!(errors[0] < 0.1, "{errors:?}");
    assert!(errors[1] < errors[0] / 3.0, "{errors:?}");
}

#[test]
fn decay_shrinks_the_whole_weight() {
    let before = layer([6, 5], 2, 4.0, false);
    let rule = LoraProConfig::new().with_weight_decay(0.1).init(&before).unwrap();
    let after = rule.decay(before.clone(), 0.05);
    let expected = weight(&before).mul_scalar(1.0 - 0.05 * 0.1);
    assert!(distance(weight(&after), expected.clone()) < 1e-6 * distance(expected.zeros_like(), expected));
    let adapter = after.weight.adapter().unwrap();
    assert!(adapter.a.is_require_grad() && adapter.b.is_require_grad() && !after.weight.base().is_require_grad());
    assert!(LoraProConfig::new().with_mode(LoraProMode::Sgd).with_weight_decay(0.1).init(&before).is_err());
}

#[test]
fn the_state_is_that_of_the_weight_and_goes_on_from_a_record() {
    let g = |step: u64| tensor_of(9, 7, 40 + step);
    let start = layer([9, 7], 3, 6.0, false);
    let meter = StateMeter::new();
    let rule = LoraProConfig::new().over(&start, LoraPair::of(&start).unwrap(), &meter).unwrap();
    let (mut whole, mut half) = (start.clone(), None);
    for step in 0..6 {
        meter.start();
        whole = descent(whole, &rule, &g(step), 1e-2);
        assert_eq!(meter.stop(), 2 * 4 * 9 * 7);
        if step == 2 {
            half = Some((whole.clone(), rule.to_record().into_bytes().unwrap()));
        }
    }
    let (mut resumed, bytes) = half.unwrap();
    let rule = LoraProConfig::new().init(&resumed).unwrap();
    rule.load_record(OptimizerRecord::from_bytes(bytes).unwrap());
    for step in 3..6 {
        resumed = descent(resumed, &rule, &g(step), 1e-2);
    }
    let (ours, expected) = (factors(&resumed), factors(&whole));
    for (ours, expected) in ours.into_iter().zip(expected) {
        assert_eq!(host(ours), host(expected));
    }
}

#[derive(Module, Debug)]
struct Blocks {
    first: Linear,
    second: Linear,
}

struct Ids<'a>(&'a GradientsParams, Vec<(ParamId, Vec<f32>)>);

impl ModuleVisitor for Ids<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.0.get::<D>(param.id) {
            self.1.push((param.id, lowrank_kernels::host::values(grad)));
        }
    }
}

fn seen(module: &Blocks, grads: &GradientsParams) -> Vec<(ParamId, Vec<f32>)> {
    let mut ids = Ids(grads, Vec::new());
    module.visit(&mut ids);
    ids.1
}

#[test]
fn blocks_one_by_one_give_what_all_together_give_and_lone_halves_are_refused() {
    let module = Blocks { first: layer([5, 6], 2, 4.0, false), second: layer([6, 4], 3, 4.0, false) };
    let rule = LoraProConfig::new().with_mode(LoraProMode::Efficient).init(&module).unwrap();
    let grads = |first: bool, second: bool| {
        let mut loss = Tensor::<1>::zeros([1], &device());
        if first {
            loss = loss + module.first.weight.val().square().sum();
        }
        if second {
            loss = loss + module.second.weight.val().square().sum();
        }
        GradientsParams::from_grads(loss.backward(), &module)
    };
    let all = seen(&module, &rule.apply(&module, grads(true, true)).unwrap());
    let first = seen(&module, &rule.apply(&module, grads(true, false)).unwrap());
    let second = seen(&module, &rule.apply(&module, grads(false, true)).unwrap());
    assert_eq!(all, [first, second].concat());
    assert_eq!(all.len(), 4);

    let mut lone = grads(true, true);
    lone.remove::<2>(module.second.weight.adapter().unwrap().a.id);
    let error = rule.apply(&module, lone).unwrap_err();
    assert_eq!(error, OptimError::LoneFactor { path: "second".into(), present: "B", missing: "A" });

    let mut bad = grads(true, true);
    let id = module.first.weight.adapter().unwrap().b.id;
    bad.register(id, bad.get::<2>(id).unwrap().mul_scalar(f32::INFINITY));
    assert!(matches!(rule.apply(&module, bad), Err(OptimError::NonFiniteGradient { path, .. }) if path == "first"));
}

const ROWS: usize = 48;
const SIDES: [usize; 2] = [12, 10];
const STEPS: usize = 25;

/// Least squares with a target of full rank: the remaining loss after some steps at the best of some rates.
#[test]
fn at_their_best_rates_it_learns_between_lora_and_full_fine_tuning() {
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Way {
        Full,
        Lora,
        LoraPro,
    }
    let (x, target) = (tensor_of(ROWS, SIDES[0], 11), tensor_of(SIDES[0], SIDES[1], 12));
    let run = |way: Way, lr: f64| -> f32 {
        let plain = layer(SIDES, 4, 4.0, true);
        let mut layer = if way == Way::Full { plain.materialize().set_require_grad(true) } else { plain };
        let rule = (way == Way::LoraPro).then(|| LoraProConfig::new().init(&layer).unwrap());
        let mut optimizer = match way {
            Way::LoraPro => SgdConfig::new().init(),
            _ => AdamWConfig::new().init(),
        };
        let loss = |layer: &Layer| {
            let error = Tensor::from_inner(x.clone()).matmul(layer.weight.val() - Tensor::from_inner(target.clone()));
            error.square().mean()
        };
        for _ in 0..STEPS {
            let grads = GradientsParams::from_grads(loss(&layer).backward(), &layer);
            let grads = match &rule {
                Some(rule) => rule.apply(&layer, grads).unwrap(),
                None => grads,
            };
            layer = optimizer.step(lr, layer, grads);
        }
        loss(&layer).into_scalar()
    };
    let best = |way: Way| {
        let rates = (0..12).map(|place| 0.5 * 0.5f64.powi(place));
        rates.map(|lr| run(way, lr)).filter(|loss| loss.is_finite()).fold(f32::INFINITY, f32::min)
    };
    let [full, pro, lora] = [Way::Full, Way::LoraPro, Way::Lora].map(best);
    println!("full {full}, LoRA-Pro {pro}, LoRA {lora}");
    assert!(full <= pro && pro <= lora, "full {full}, LoRA-Pro {pro}, LoRA {lora}");
}
