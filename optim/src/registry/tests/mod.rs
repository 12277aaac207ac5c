//! The conformance matrix: the same tests for every method.

use burn::module::{Module, Param};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{DType, Device, Tensor, TensorData};
use lowrank_kernels::host::values;
use serde_json::Value;

use super::*;
use crate::parameters::ParameterRoles;
use crate::state::meter::StateMeter;
use crate::state::reset::{MomentReset, MomentResets, ResetOrder};

mod refusals;

/// A module of one matrix, which is hidden by its name.
#[derive(Module, Debug)]
struct Matrix {
    weight: Param<Tensor<2>>,
    other: Param<Tensor<1>>,
}

fn wave(shape: [usize; 2], seed: f32) -> Tensor<2> {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.731 + seed).sin()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::default())
}

impl Matrix {
    fn new(shape: [usize; 2]) -> Self {
        Self {
            weight: Param::from_tensor(wave(shape, 0.3).autodiff()),
            other: Param::from_tensor(Tensor::from_data([0.5f32, -0.5], &Device::default().autodiff())),
        }
    }

    fn grads(&self, g: Tensor<2>) -> GradientsParams {
        let mut grads = GradientsParams::new();
        grads.register(self.weight.id, g);
        grads.register(self.other.id, Tensor::<1>::from_data([0.1f32, 0.2], &Device::default()));
        grads
    }
}

/// A run of one method on one matrix.
struct Run {
    optimizer: ModuleOptimizer,
    meter: StateMeter,
    module: Matrix,
}

impl Run {
    fn new(method: &Method, options: &Options, shape: [usize; 2]) -> Self {
        Self::of(method, options, Matrix::new(shape))
    }

    fn of(method: &Method, options: &Options, module: Matrix) -> Self {
        let meter = StateMeter::new();
        let (optimizer, _) = method
            .init(options, &ParameterRoles::of(&module), &meter)
            .unwrap_or_else(|error| panic!("{} {options:?}: {error}", method.name));
        Self { optimizer, meter, module }
    }

    /// Steps with a gradient; returns the bytes of the state of the matrix.
    fn step(&mut self, g: Tensor<2>) -> usize {
        let grads = self.module.grads(g);
        self.meter.start();
        self.module = self.optimizer.step(0.01, self.module.clone(), grads);
        // The vector's two f32 moments of two values are counted too.
        self.meter.stop() as usize - 16
    }

    fn weight(&self) -> Vec<f32> {
        values(self.module.weight.val().inner())
    }
}

/// Every method with options that fit a matrix whose smaller side is `side`, and the choices that change the stored state.
fn variants(side: usize) -> Vec<(&'static Method, Options)> {
    let text = |word: &str| Value::from(word);
    let count = |count: i64| Value::from(count);
    let mut all = Vec::new();
    for method in METHODS {
        let list = method.options();
        let has = |name: &str| list.get(name).is_some();
        let mut base = Options::new();
        if has("rank") && !["frugal", "apollo-mini"].contains(&method.name) {
            base.insert("rank".into(), count(side.div_ceil(2) as i64));
        }
        if has("update_proj_gap") {
            base.insert("update_proj_gap".into(), count(2));
        }
        if method.name == "frugal" {
            base.insert("density".into(), Value::from(0.5));
        }
        all.push((method, base.clone()));
        let mut with = |pairs: &[(&str, Value)]| {
            let mut options = base.clone();
            options.extend(pairs.iter().map(|(name, value)| (name.to_string(), value.clone())));
            all.push((method, options));
        };
        let small = ("min_8bit_size", count(0));
        match method.name {
            "dct-adamw" => {
                for feedback in ["none", "full"] {
                    with(&[("error_feedback", text(feedback))]);
                }
                with(&[("error_levels", count(15))]);
                with(&[("side", text("left"))]);
                with(&[("transform", text("matmul")), ("basis", text("random")), ("weighted", Value::from(true))]);
                with(&[("rotate", Value::from(false)), ("basis", text("dct2"))]);
                with(&[("moments", text("bf16"))]);
            }
            "galore" => {
                with(&[("side", text("full"))]);
                with(&[("side", text("reverse_std")), ("rank", count(1))]);
                with(&[("moments", text("bf16")), ("projector", text("dct"))]);
                with(&[("projector", text("power"))]);
                with(&[("projector", text("random"))]);
                with(&[("moments", text("8bit")), small]);
            }
            "q-galore" => with(&[("proj_group", count(2)), small, ("lazy_queue", count(1))]),
            "adamw-8bit" => {
                with(std::slice::from_ref(&small));
                with(&[small, ("codes", text("companded"))]);
            }
            "fira" => {
                with(&[("projector", text("dct")), ("pure", Value::from(true))]);
                with(&[("granularity", text("matrix"))]);
            }
            "frugal" => {
                for projector in ["columns", "rows", "randk", "svd", "random", "randperm", "dct"] {
                    with(&[("projector", text(projector))]);
                }
                with(&[("projector", text("columns")), ("reset_statistics", Value::from(false))]);
                with(&[("projector", text("randk")), ("inner", text("lion"))]);
                with(&[("projector", text("columns")), ("inner", text("momentum"))]);
            }
            "ldadam" => {
                with(&[("projector", text("svd"))]);
                with(&[("projector", text("dct"))]);
                with(&[("error_feedback", Value::from(false))]);
            }
            "apollo" => with(&[("projector", text("svd"))]),
            "scale" => with(&[("normalisation", text("l2"))]),
            "dion" => with(&[("right", text("qr"))]),
            _ => {}
        }
    }
    all
}

const SHAPES: [[usize; 2]; 8] = [[8, 5], [5, 8], [7, 7], [1, 9], [9, 1], [1, 1], [3, 40], [64, 64]];

#[test]
fn names_are_unique_and_unknown_ones_get_the_nearest() {
    for method in METHODS {
        assert_eq!(METHODS.iter().filter(|other| other.name == method.name).count(), 1);
        assert!(std::ptr::eq(optimizer(method.name).unwrap(), method));
    }
    assert!(optimizer("adamv").unwrap_err().to_string().contains("did you mean \"adamw\""));
}

#[test]
fn every_option_has_one_name_help_and_a_default_that_is_allowed() {
    for method in METHODS {
        let options = method.options();
        for (number, option) in options.iter().enumerate() {
            let place = format!("{} {}", method.name, option.name);
            assert!(option.help.ends_with('.'), "{place}: {:?}", option.help);
            assert!(options.iter().skip(number + 1).all(|other| other.name != option.name), "{place} is there twice");
            match &option.default {
                Some(default) => option.check(default).unwrap_or_else(|error| panic!("{place}: {error}")),
                None => assert_eq!(option.name, "rank", "{place}"),
            }
        }
    }
}

#[test]
fn states_take_the_bytes_of_the_formula() {
    for shape in SHAPES {
        for (method, options) in variants(shape[0].min(shape[1])) {
            let mut run = Run::new(method, &options, shape);
            for step in 0..4 {
                let bytes = run.step(wave(shape, step as f32));
                let expected = method.state_bytes(&options, shape).unwrap();
                // A block without a turn holds nothing; cosines of lazy renewals are four bytes each.
                let turns = method.name == "frugal" && !options.contains_key("projector");
                let lazy = options.get("lazy_queue").map_or(0, |_| 4);
                let right = bytes == expected || turns && bytes == 0 || bytes == expected + lazy;
                assert!(
                    right || method.name == "q-galore" && bytes <= expected + 20,
                    "{} {shape:?} {options:?}: {bytes} instead of {expected}",
                    method.name
                );
            }
        }
    }
}

#[test]
fn weights_move_and_stay_finite_whatever_the_gradient() {
    for shape in SHAPES {
        for (method, options) in variants(shape[0].min(shape[1])) {
            let rank_one = wave([shape[0], 1], 1.0).matmul(wave([1, shape[1]], 2.0));
            for (name, g) in [
                ("zero", wave(shape, 1.0) * 0.0),
                ("rank one", rank_one),
                ("huge", wave(shape, 1.0) * 1e30),
                ("denormal", wave(shape, 1.0) * 1e-40),
                ("constant", wave(shape, 1.0) * 0.0 + 1.0),
            ] {
                let mut run = Run::new(method, &options, shape);
                let before = run.weight();
                for step in 0..5 {
                    run.step(if step == 1 { wave(shape, 4.0) } else { g.clone() });
                    let weight = run.weight();
                    assert!(
                        weight.iter().all(|w| w.is_finite()),
                        "{} {shape:?} {name} at {step} {options:?}",
                        method.name
                    );
                    if name == "zero" && step == 0 && !options.contains_key("weight_bits") && method.name != "q-galore"
                    {
                        let moved = weight.iter().zip(&before).any(|(a, b)| (a - b).abs() > 0.001);
                        assert!(!moved, "{} {shape:?} moves at a zero gradient {options:?}", method.name);
                    }
                }
                // The squares of huge gradients are infinite in f32, from which no step can be computed.
                let moved = run.weight() != before;
                assert!(moved || name == "huge", "{} {shape:?} {name} {options:?}", method.name);
            }
        }
    }
}

/// A matrix whose rows, or columns, at the multiples of `every` are zero.
fn with_zeros(shape: [usize; 2], seed: f32, every: usize, axis: usize) -> Tensor<2> {
    let keep: Vec<f32> = (0..shape[axis]).map(|i| f32::from(u8::from(i % every != 0))).collect();
    let size = if axis == 0 { [shape[0], 1] } else { [1, shape[1]] };
    wave(shape, seed) * Tensor::from_data(TensorData::new(keep, size), &Device::default())
}

/// Returns true if a projection mixes the lines of an axis with others: then those without a gradient move as well.
fn mixes(method: &Method, options: &Options, [rows, columns]: [usize; 2], axis: usize) -> bool {
    let said = |name: &str| options.get(name).and_then(Value::as_str);
    let right = match (said("projector"), said("side").unwrap_or("std")) {
        (Some("columns"), _) => true,
        (Some("rows"), _) => false,
        (_, "std") if method.name == "ldadam" => rows > columns,
        (_, "std") => rows >= columns,
        (_, "reverse_std") => rows < columns,
        (_, side) => side == "right",
    };
    match method.name {
        // Of elements, or scaled gradients of full rank.
        "adamw" | "adamw-8bit" | "muon" | "apollo" | "apollo-mini" | "scale" => false,
        _ => said("side") == Some("full") || (axis == 1) == right,
    }
}

/// Rounding must not move a line whose gradient is always zero: the direction of Adam has a size of its own, however small what it comes from.
#[test]
fn lines_without_a_gradient_do_not_move() {
    let mut moved = Vec::new();
    for shape in [[24, 10], [10, 24], [17, 17]] {
        for (method, mut options) in variants(10) {
            let has_decay = method.options().get("weight_decay").is_some();
            if method.name == "q-galore" || !has_decay {
                continue;
            }
            options.insert("weight_decay".into(), Value::from(0.0));
            for axis in (0..2).filter(|axis| !mixes(method, &options, shape, *axis)) {
                let mut run = Run::new(method, &options, shape);
                let before = run.weight();
                for step in 0..8 {
                    run.step(with_zeros(shape, step as f32, 3, axis));
                }
                let without = |i: &usize| {
                    if axis == 0 { (i / shape[1]).is_multiple_of(3) } else { (i % shape[1]).is_multiple_of(3) }
                };
                let after = run.weight();
                let most = (0..before.len()).filter(without).map(|i| (after[i] - before[i]).abs()).fold(0f32, f32::max);
                if most > 1e-7 {
                    moved.push(format!("{} {shape:?} axis {axis} {options:?}: {most}", method.name));
                }
            }
        }
    }
    assert!(moved.is_empty(), "{}", moved.join("\n"));
}

/// Gradients that are not finite are rejected before ([`GlobalNormClip`](crate::GlobalNormClip)); without it they appear in the
/// weights of that parameter only.
#[test]
fn gradients_that_are_not_finite_neither_hang_nor_hide_nor_spread() {
    for shape in [[8, 5], [5, 8], [1, 1]] {
        for (method, options) in variants(shape[0].min(shape[1])) {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut run = Run::new(method, &options, shape);
                run.step(wave(shape, 1.0));
                assert!(run.weight().iter().all(|value| value.is_finite()), "{} {options:?}", method.name);
                run.step(wave(shape, 2.0) * bad);
                // FRUGAL's update outside its subspace is one by signs, which cannot say it: the sign of NaN is 0.
                let by_signs = method.name == "frugal";
                let hidden = run.weight().iter().all(|value| value.is_finite());
                assert!(by_signs || !hidden, "{} hides a gradient of {bad} {options:?}", method.name);
                run.step(wave(shape, 3.0));
                let others = run.module.other.val().into_data().try_to_vec::<f32>().unwrap();
                assert!(others.iter().all(|value| value.is_finite()), "{} {options:?}", method.name);
            }
        }
    }
}

#[test]
fn a_missing_gradient_leaves_weights_and_states_alone() {
    for (method, options) in variants(5) {
        let mut run = Run::new(method, &options, [8, 5]);
        run.step(wave([8, 5], 1.0));
        let before = run.weight();
        let mut grads = GradientsParams::new();
        grads.register(run.module.other.id, Tensor::<1>::from_data([0.1f32, 0.2], &Device::default()));
        run.module = run.optimizer.step(0.01, run.module.clone(), grads);
        assert_eq!(run.weight(), before, "{}", method.name);
    }
}

#[test]
fn a_run_goes_on_bit_by_bit_from_its_record() {
    for shape in [[8, 5], [5, 8], [64, 64]] {
        for (method, options) in variants(shape[0].min(shape[1])) {
            let mut whole = Run::new(method, &options, shape);
            for step in 0..5 {
                whole.step(wave(shape, step as f32));
            }
            let bytes = whole.optimizer.to_record().into_bytes().unwrap();
            let mut resumed = Run::of(method, &options, whole.module.clone());
            let record = OptimizerRecord::from_bytes(bytes).unwrap();
            resumed.optimizer = resumed.optimizer.load_record(record);
            for step in 5..10 {
                whole.step(wave(shape, step as f32));
                resumed.step(wave(shape, step as f32));
                let same = whole.weight().iter().zip(resumed.weight()).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{} {shape:?} differs at step {step} {options:?}", method.name);
            }
        }
    }
}

#[test]
fn parameters_of_half_precision_keep_their_type() {
    for (method, options) in variants(5) {
        let mut run = Run::new(method, &options, [8, 5]);
        run.module.weight = Param::initialized(run.module.weight.id, run.module.weight.val().cast(DType::BF16));
        run.step(wave([8, 5], 1.0).cast(DType::BF16));
        assert_eq!(run.module.weight.val().dtype(), DType::BF16, "{}", method.name);
    }
}

#[test]
fn ranks_up_to_the_smaller_side_are_taken_and_larger_ones_refused() {
    for method in METHODS.iter().filter(|method| method.options().get("rank").is_some()) {
        let with = |rank: i64| {
            let mut options = Options::from_iter([("rank".to_string(), Value::from(rank))]);
            if method.name == "frugal" {
                options.insert("projector".into(), Value::from("svd"));
            }
            let module = Matrix::new([8, 5]);
            method.init(&options, &ParameterRoles::of(&module), &StateMeter::new()).map(|_| options)
        };
        for rank in [1, 5] {
            let options = with(rank).unwrap();
            let mut run = Run::new(method, &options, [8, 5]);
            for step in 0..3 {
                run.step(wave([8, 5], step as f32));
            }
            assert!(run.weight().iter().all(|w| w.is_finite()));
        }
        let refusal = with(6).unwrap_err().to_string();
        assert!(refusal.contains("rank"), "{}: {refusal}", method.name);
    }
}

/// With its moments at 0 a zero gradient moves nothing; before the reset it does.
#[test]
fn moments_are_set_back_where_that_is_defined_and_refused_elsewhere() {
    for (method, options) in variants(6) {
        let (meter, resets, module) = (StateMeter::new(), MomentResets::default(), Matrix::new([6, 8]));
        let built = method.init_resettable(&options, &ParameterRoles::of(&module), &meter, &resets);
        let (optimizer, _) = match built {
            Ok(built) => built,
            Err(error) => {
                assert!(!["adamw", "adamw-8bit", "muon"].contains(&method.name), "{}: {error}", method.name);
                assert!(error.to_string().contains("adamw, adamw-8bit, muon"), "{error}");
                continue;
            }
        };
        let mut run = Run { optimizer, meter, module };
        for seed in 0..3 {
            run.step(wave([6, 8], seed as f32));
        }
        let still = |run: &mut Run| {
            let before = run.weight();
            run.step(Tensor::zeros([6, 8], &Device::default()));
            run.weight() == before
        };
        assert!(!still(&mut run), "{}", method.name);
        let (before, id) = (run.weight(), run.module.weight.id);
        let reset = ResetOrder { reset: MomentReset::Zero, seed: 1, number: 1 };
        run.module = resets.apply(reset, &mut run.optimizer, run.module.clone(), &[id]);
        assert_eq!(run.weight(), before, "{}", method.name);
        assert!(still(&mut run), "{} {options:?}", method.name);
    }
}
