//! Training rules: LoRA-Pro, ALLoRA, LoRA+ and LoRA-FA.

use std::collections::BTreeMap;

use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord, SgdConfig};
use burn::tensor::{Tensor, TensorData};
use burn_pack::Reader;
use lowrank_models::Dense;
use lowrank_models::adapter::{AdapterConfig, AnyStructure, GivenTensors, GradientRule, Rule};
use lowrank_optim::StateMeter;
use lowrank_optim::registry::{Options, optimizer as find};
use lowrank_optim::rules::{LoraProMode, LoraProX};

use super::adapters::{Bench, adapter, attached_to, near, slope};
use super::case::{Array, Case, Outcome, host};

/// Names of X in cases.
const X_MODES: [(&str, LoraProX); 3] =
    [("zero", LoraProX::Zero), ("sylvester", LoraProX::Sylvester), ("symmetry", LoraProX::Symmetry)];

fn text(error: impl ToString) -> String {
    error.to_string()
}

/// A layer `weight [d_out, d_in]` with an adapter of the case's tensors.
fn bench(case: &Case, weight: Array, config: &AdapterConfig, [a, b]: [&str; 2]) -> Result<Bench, String> {
    let given = |name: &str| -> Result<TensorData, String> {
        let array = case.array(name)?;
        Ok(TensorData::new(array.f32(), array.shape.clone()))
    };
    let given = GivenTensors::from([("a".to_string(), given(a)?), ("b".to_string(), given(b)?)]);
    attached_to(Dense::from_parts(weight.tensor::<2>().transpose().autodiff(), None), config, given)
}

/// A layer in training by a rule.
struct Training {
    bench: Bench,
    optimizer: ModuleOptimizer,
    rule: Option<GradientRule>,
    lr: f64,
}

impl Training {
    fn new(case: &Case, bench: Bench, rule: Rule) -> Result<Self, String> {
        let number = |value: f64| serde_json::Value::from(value);
        let betas = case.config["betas"].as_array().ok_or("configuration: betas")?;
        let beta = |place: usize| betas.get(place).and_then(serde_json::Value::as_f64).ok_or("configuration: betas");
        let options = Options::from_iter([
            ("beta_1".to_string(), number(beta(0)?)),
            ("beta_2".into(), number(beta(1)?)),
            ("epsilon".into(), number(case.number("eps")?)),
            ("weight_decay".into(), number(case.number("weight_decay")?)),
        ]);
        let bench = rule.freeze(bench);
        let options = rule.options("adamw", options).map_err(text)?;
        let meter = StateMeter::new();
        let method = find("adamw").map_err(text)?;
        let optimizer = match case.config["optimizer"].as_str() {
            Some("sgd") => SgdConfig::new().init(),
            Some("adamw") | None => method.init(&options, &rule.parameters(&bench), &meter).map_err(text)?.0,
            Some(other) => return Err(format!("configuration: optimizer is \"{other}\"")),
        };
        let rule = rule.gradient_rule(&bench, &options, &meter).map_err(text)?;
        Ok(Self { bench, optimizer, rule, lr: case.number("lr")? })
    }

    /// The gradients as the optimizer sees them.
    fn seen(&self, grads: GradientsParams) -> Result<GradientsParams, String> {
        match &self.rule {
            Some(rule) => rule.apply(&self.bench, grads).map_err(text),
            None => Ok(grads),
        }
    }

    fn step(mut self, grads: GradientsParams) -> Self {
        if let Some(rule) = &self.rule {
            self.bench = rule.decay(self.bench, self.lr);
        }
        self.bench = self.optimizer.step(self.lr, self.bench, grads);
        self
    }

    /// Compares the factors with `A_<step>` and `B_<step>`.
    fn compare(&self, case: &Case, step: usize, share: f64) -> Result<(), String> {
        for (tensor, data) in adapter(&self.bench).tensors() {
            let ours: Vec<f32> = data.try_into_vec().map_err(|error| format!("{error:?}"))?;
            near(case, &format!("{}_{step}", tensor.field.to_uppercase()), &ours, share)?;
        }
        Ok(())
    }
}

/// Gradients of the factors, laid out as in cases.
fn slopes(bench: &Bench, grads: &mut GradientsParams) -> Result<BTreeMap<String, Vec<f32>>, String> {
    let tensors = adapter(bench).shapes();
    tensors.iter().map(|tensor| Ok((tensor.field.to_uppercase(), slope(grads, tensor)?))).collect()
}

/// Moments by parameter and name.
fn moments(record: OptimizerRecord) -> Result<BTreeMap<String, Vec<f32>>, String> {
    let reader = Reader::from_bytes(record.into_bytes().map_err(text)?).map_err(text)?;
    let mut found = BTreeMap::new();
    for tensor in reader.into_tensors().map_err(text)? {
        let (name, dtype, shape, _, bytes) = tensor.into_parts().map_err(text)?;
        // Cases hold the transpose.
        let moment = Tensor::<2>::from_data(TensorData::from_bytes(bytes, shape, dtype), &Default::default());
        found.insert(name, host(moment.transpose()));
    }
    Ok(found)
}

pub fn lora_pro(case: &Case) -> Outcome {
    let rank = case.count("rank")?;
    let config = AdapterConfig::new("lora").with_rank(rank).with_alpha(case.number("scale")? * rank as f64);
    match (case.has("full_grad"), case.has("full_grads")) {
        (true, false) => closed_form(case, &config),
        (false, true) => lora_pro_training(case, &config),
        _ => Err("is of no known kind".into()),
    }
}

fn closed_form(case: &Case, config: &AdapterConfig) -> Outcome {
    let gradient = case.array("full_grad")?;
    let zeros = Array { shape: gradient.shape.clone(), values: vec![0.0; gradient.values.len()] };
    let bench = bench(case, zeros, config, ["A", "B"])?;
    let plain = slopes(&bench, &mut bench.pulled(gradient.tensor()))?;
    let mut adjusted = BTreeMap::new();
    for (name, x_mode) in X_MODES {
        let rule = Rule::LoraPro { mode: LoraProMode::Sgd, x_mode, delta: case.number("delta")? };
        let rule = rule.gradient_rule(&bench, &Options::new(), &StateMeter::new()).map_err(text)?;
        let rule = rule.ok_or("lora-pro has a gradient rule")?;
        let mut grads = rule.apply(&bench, bench.pulled(gradient.tensor())).map_err(text)?;
        adjusted.insert(name, slopes(&bench, &mut grads)?);
    }
    let a = case.array("A")?;
    for factor in ["A", "B"] {
        near(case, &format!("lora_grad_{factor}"), &plain[factor], 1e-5)?;
    }
    for (name, slopes) in &adjusted {
        for factor in ["A", "B"] {
            near(case, &format!("{name}_grad_{factor}"), &slopes[factor], 1e-5)?;
        }
        near(case, "equivalent_grad", &equivalent(case, slopes)?, 1e-5)?;
        // X enters the gradient of A as X A.
        let x = case.array(&format!("{name}_X"))?;
        let mut expected = Array { shape: a.shape.clone(), values: Vec::new() };
        let (rank, d_in) = (a.shape[0], a.shape[1]);
        for (row, column) in (0..rank).flat_map(|row| (0..d_in).map(move |column| (row, column))) {
            expected.values.push((0..rank).map(|k| x.values[row * rank + k] * a.values[k * d_in + column]).sum());
        }
        let ours: Vec<f32> = slopes["A"].iter().zip(&adjusted["zero"]["A"]).map(|(ours, zero)| ours - zero).collect();
        let largest = case.array(&format!("{name}_grad_A"))?.largest();
        expected.near(&format!("{name}_X A"), &ours, 1e-5 * largest, 0.0)?;
    }
    Ok("adjusted gradients are equal for every X".into())
}

/// `scale (B gA + gB A)` in f64, for factors `A` and `B` of the case.
fn equivalent(case: &Case, slopes: &BTreeMap<String, Vec<f32>>) -> Result<Vec<f32>, String> {
    equivalent_of([case.array("A")?.f32(), case.array("B")?.f32()], slopes, case.count("rank")?, case.number("scale")?)
}

fn equivalent_of(
    [a, b]: [Vec<f32>; 2],
    slopes: &BTreeMap<String, Vec<f32>>,
    rank: usize,
    scale: f64,
) -> Result<Vec<f32>, String> {
    let (d_in, d_out) = (a.len() / rank, b.len() / rank);
    let product = |left: &[f32], right: &[f32], row: usize, column: usize| -> f64 {
        (0..rank).map(|k| f64::from(left[row * rank + k]) * f64::from(right[k * d_in + column])).sum()
    };
    let places = (0..d_out).flat_map(|row| (0..d_in).map(move |column| (row, column)));
    Ok(places
        .map(|(row, column)| {
            let sum = product(&b, &slopes["A"], row, column) + product(&slopes["B"], &a, row, column);
            (scale * sum) as f32
        })
        .collect())
}

fn lora_pro_training(case: &Case, config: &AdapterConfig) -> Outcome {
    let modes = [("full", LoraProMode::Full), ("efficient", LoraProMode::Efficient), ("sgd", LoraProMode::Sgd)];
    let mode = case.choice("mode", &modes)?;
    let delta = case.number("delta")?;
    let rule = Rule::LoraPro { mode, x_mode: case.choice("x_mode", &X_MODES)?, delta };
    let bare = Rule::LoraPro { mode: LoraProMode::Sgd, x_mode: LoraProX::Zero, delta };
    let mut training = Training::new(case, bench(case, case.array("W_0")?, config, ["A_0", "B_0"])?, rule)?;
    // From B = 0 the moments of the first steps are divisions of tiny numbers.
    let share = if mode == LoraProMode::Efficient && case.array("B_0")?.largest() == 0.0 { 1e-4 } else { 1e-5 };
    let gradients = case.array("full_grads")?;
    for step in 1..=gradients.shape[0] {
        let pulled = || training.bench.pulled(gradients.at(step - 1).tensor());
        let name = format!("equivalent_grad_{step}");
        if case.has(&name) {
            let none = (Options::new(), StateMeter::new());
            let bare = bare.gradient_rule(&training.bench, &none.0, &none.1).map_err(text)?;
            let bare = bare.ok_or("lora-pro has a gradient rule")?;
            let slopes = slopes(&training.bench, &mut bare.apply(&training.bench, pulled()).map_err(text)?)?;
            let mut factors = BTreeMap::new();
            for (tensor, data) in adapter(&training.bench).tensors() {
                factors.insert(tensor.field.clone(), data.try_into_vec().map_err(|error| format!("{error:?}"))?);
            }
            let factors = ["a", "b"].map(|field| factors.remove(field).unwrap_or_default());
            let ours = equivalent_of(factors, &slopes, case.count("rank")?, case.number("scale")?)?;
            near(case, &name, &ours, share)?;
        }
        let grads = training.seen(pulled())?;
        training = training.step(grads);
        training.compare(case, step, share)?;
        near(case, &format!("W_effective_{step}"), &host(training.bench.weight().transpose()), share)?;
    }
    near(case, "W_final", &host(training.bench.base().transpose()), 1e-6)?;
    states(case, &training, share)?;
    Ok("factors, weights and moments are equal at every step".into())
}

/// The moments at the end: of the weight, or of the factors.
fn states(case: &Case, training: &Training, share: f64) -> Result<(), String> {
    let of_weight = case.has("state_m");
    let record = match (&training.rule, of_weight) {
        (Some(rule), true) => rule.to_record(),
        _ => training.optimizer.to_record(),
    };
    let moments = moments(record)?;
    let ids: Vec<(String, u64)> = match of_weight {
        true => vec![(String::new(), training.bench.base_id().val())],
        false => adapter(&training.bench).shapes().iter().map(|t| (t.field.to_uppercase(), t.id.val())).collect(),
    };
    for (factor, id) in ids {
        for (short, long) in [("m", "moment_1"), ("v", "moment_2")] {
            let name = format!("state_{short}{factor}");
            if case.has(&name) {
                let ours = moments.get(&format!("{id}.{long}")).ok_or(format!("{name} is not kept"))?;
                near(case, &name, ours, share)?;
            }
        }
    }
    Ok(())
}

pub fn allora(case: &Case) -> Outcome {
    let norm_of = case.choice("norm_of", &[("ba_row", "ba_row"), ("b_row", "b_row")])?;
    let rank = case.count("rank")?;
    let rule = serde_json::json!({ "name": "allora", "eta": case.number("eta")?, "norm_of": norm_of });
    let rule: Rule = serde_json::from_value(rule).map_err(text)?;
    let config = rule.prepare(AdapterConfig::new("lora").with_rank(rank)).map_err(text)?;
    if case.has("A_0") {
        return trained(case, &config, rule);
    }
    let plain = AdapterConfig::new("lora").with_rank(rank).with_alpha(rank as f64);
    for (config, word) in [(&config, ""), (&plain, "plain_")] {
        let bench = bench(case, case.array("W")?, config, ["A", "B"])?;
        let x = case.array("x")?.tensor::<2>().autodiff().require_grad();
        let y = bench.output(x.clone());
        near(case, "y", &host(y.clone().inner()), 1e-5)?;
        let loss = (y - case.array("target")?.tensor::<2>().autodiff()).square().mean();
        near(case, "loss", &host(loss.clone().inner()), 1e-5)?;
        let mut grads = loss.backward();
        near(case, "grad_x", &host(x.grad_remove(&mut grads).ok_or("x has no gradient")?), 1e-5)?;
        for (factor, slope) in slopes(&bench, &mut GradientsParams::from_grads(grads, &bench))? {
            near(case, &format!("{word}grad_{factor}"), &slope, 1e-5)?;
        }
        if let AnyStructure::Allora(allora) = &adapter(&bench).structure {
            near(case, "row_scale", &host(allora.paces().inner()), 1e-5)?;
            // Layers that compose their weight give the same gradients.
            let x = case.array("x")?.tensor::<2>().autodiff();
            let y = x.matmul(bench.composed());
            let loss = (y - case.array("target")?.tensor::<2>().autodiff()).square().mean();
            for (factor, slope) in slopes(&bench, &mut GradientsParams::from_grads(loss.backward(), &bench))? {
                near(case, &format!("{word}grad_{factor}"), &slope, 1e-5)?;
            }
        }
    }
    Ok("output, paces and gradients are equal".into())
}

/// LoRA+ or LoRA-FA, as `variant` says.
pub fn lora(case: &Case, config: &AdapterConfig) -> Outcome {
    let rule = match case.word("variant")? {
        "lora_plus" => Rule::LoraPlus { ratio: case.number("lr_ratio_b_over_a")? },
        "lora_fa" => Rule::LoraFa { corrected: case.flag("corrected").unwrap_or(true) },
        other => return Err(format!("configuration: variant is \"{other}\"")),
    };
    trained(case, &rule.prepare(config.clone()).map_err(text)?, rule)
}

/// A trajectory from `A_0` and `B_0` on `x[k]` and `target[k]`.
fn trained(case: &Case, config: &AdapterConfig, rule: Rule) -> Outcome {
    let mut training = Training::new(case, bench(case, case.array("W")?, config, ["A_0", "B_0"])?, rule)?;
    let (x, target, mut losses) = (case.array("x")?, case.array("target")?, Vec::new());
    for step in 1..=x.shape[0] {
        let at = |array: &Array| array.at(step - 1).tensor::<2>().autodiff();
        let loss = (training.bench.output(at(&x)) - at(&target)).square().mean();
        losses.extend(host(loss.clone().inner()));
        let grads = training.seen(GradientsParams::from_grads(loss.backward(), &training.bench))?;
        let name = format!("grad_B_corrected_{step}");
        if case.has(&name) {
            let b = adapter(&training.bench).shapes().into_iter().find(|tensor| tensor.field == "b");
            let seen = grads.get::<2>(b.ok_or("there is a factor b")?.id).ok_or("B has no gradient")?;
            near(case, &name, &host(seen.transpose()), 1e-5)?;
        }
        training = training.step(grads);
        training.compare(case, step, 1e-5)?;
    }
    near(case, "loss", &losses, 1e-5)?;
    near(case, "merged_weight", &host(training.bench.weight().transpose()), 1e-5)?;
    Ok("losses, factors and merged weight are equal at every step".into())
}
