//! A layer in training by a rule.

use std::collections::BTreeMap;

use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord, SgdConfig};
use burn::tensor::{Tensor, TensorData};
use burn_pack::Reader;
use lowrank_models::Dense;
use lowrank_models::adapter::{AdapterConfig, GivenTensors, LoraFaRule, LoraPlusRule, Rule};
use lowrank_optim::StateMeter;
use lowrank_optim::registry::{Options, optimizer as find};
use lowrank_optim::rules::{GradientRule, LoraProX};

use super::bench::{Bench, adapter, attached_to, gradient, near};
use super::case::{Array, Case, Outcome, host};

/// Names of X in cases.
pub const X_MODES: [(&str, LoraProX); 3] =
    [("zero", LoraProX::Zero), ("sylvester", LoraProX::Sylvester), ("symmetry", LoraProX::Symmetry)];

pub fn text(error: impl ToString) -> String {
    error.to_string()
}

/// A layer `weight [d_out, d_in]` with an adapter of the case's tensors.
pub fn bench(case: &Case, weight: Array, config: &AdapterConfig, [a, b]: [&str; 2]) -> Result<Bench, String> {
    let given = |name: &str| -> Result<TensorData, String> {
        let array = case.array(name)?;
        Ok(TensorData::new(array.f32(), array.shape.clone()))
    };
    let given = GivenTensors::from([("a".to_string(), given(a)?), ("b".to_string(), given(b)?)]);
    attached_to(Dense::from_parts(weight.tensor::<2>().transpose().autodiff(), None), config, given)
}

/// A layer in training by a rule.
pub struct Training {
    pub bench: Bench,
    pub optimizer: ModuleOptimizer,
    pub rule: Option<Box<dyn GradientRule>>,
    pub lr: f64,
}

impl Training {
    pub fn new(case: &Case, bench: Bench, rule: &dyn Rule) -> Result<Self, String> {
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
        let rule = rule.gradients(&bench, &options, &meter).map_err(text)?;
        Ok(Self { bench, optimizer, rule, lr: case.number("lr")? })
    }

    /// The gradients as the optimizer sees them.
    pub fn seen(&self, grads: GradientsParams) -> Result<GradientsParams, String> {
        match &self.rule {
            Some(rule) => rule.apply(&self.bench, grads).map_err(text),
            None => Ok(grads),
        }
    }

    pub fn step(mut self, grads: GradientsParams) -> Self {
        if let Some(rule) = &self.rule {
            self.bench = rule.decay(self.bench, self.lr);
        }
        self.bench = self.optimizer.step(self.lr, self.bench, grads);
        self
    }

    /// Compares the factors with `A_<step>` and `B_<step>`.
    pub fn compare(&self, case: &Case, step: usize, share: f64) -> Result<(), String> {
        for (tensor, data) in adapter(&self.bench).tensors() {
            let ours: Vec<f32> = data.try_into_vec().map_err(|error| format!("{error:?}"))?;
            near(case, &format!("{}_{step}", tensor.field.to_uppercase()), &ours, share)?;
        }
        Ok(())
    }
}

/// Gradients of the factors, laid out as in cases.
pub fn gradients(bench: &Bench, grads: &mut GradientsParams) -> Result<BTreeMap<String, Vec<f32>>, String> {
    let tensors = adapter(bench).shapes();
    tensors.iter().map(|tensor| Ok((tensor.field.to_uppercase(), gradient(grads, tensor)?))).collect()
}

/// Moments by parameter and name.
pub fn moments(record: OptimizerRecord) -> Result<BTreeMap<String, Vec<f32>>, String> {
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

/// LoRA+ or LoRA-FA, as `variant` says.
pub fn lora(case: &Case, config: &AdapterConfig) -> Outcome {
    let rule: Box<dyn Rule> = match case.word("variant")? {
        "lora_plus" => Box::new(LoraPlusRule { ratio: case.number("lr_ratio_b_over_a")? }),
        "lora_fa" => Box::new(LoraFaRule { corrected: case.flag("corrected").unwrap_or(true) }),
        other => return Err(format!("configuration: variant is \"{other}\"")),
    };
    trained(case, &rule.prepared(config.clone()).map_err(text)?, &*rule)
}

/// A trajectory from `A_0` and `B_0` on `x[k]` and `target[k]`.
pub fn trained(case: &Case, config: &AdapterConfig, rule: &dyn Rule) -> Outcome {
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
