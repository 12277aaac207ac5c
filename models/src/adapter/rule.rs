//! Training rules: how an adapter is trained, beside what it is.
//!
//! A training loop asks the rule in this order:
//!
//! ```text
//! rule.prepare(config)             the adapter's configuration as the rule needs it, or why not; rule.warnings(&config)
//! Attach::new(config).to(model)
//! rule.freeze(model)               factors that stay as they begin
//! rule.options(method, options)    options of the optimizer, or why this optimizer cannot be
//! rule.parameters(&model)          for registry::Method::init(&options, &parameters, &meter)
//! rule.gradient_rule(&model, ..)   a GradientRule, where there is one; then in each step:
//!
//! grads = clip(grads)              of all micro-batches together, once
//! grads = gradient_rule.apply(&model, grads)?          once, on the sum; the gradients of one block alone are as good
//! model = gradient_rule.decay(model, lr)               decay that acts on the whole weight
//! model = optimizer.step(lr, model, grads)
//! ```
//!
//! The state of a [`GradientRule`] belongs into checkpoints: [`GradientRule::to_record`], [`GradientRule::load_record`].

use std::collections::BTreeMap;

use burn::module::{Module, Param, ParamGroup, ParamId};
use burn::optim::{GradientsParams, OptimizerRecord};
use burn::tensor::Tensor;
use lowrank_optim::registry::{OptionValue, Options};
use lowrank_optim::rules::{LoraFa, LoraPair, LoraPro, LoraProConfig, LoraProMode, LoraProX, NormOf, check_eta};
use lowrank_optim::{HiddenMatrices, OptimError, Parameter, Role, StateMeter};
use serde::{Deserialize, Serialize};

use super::config::{AdapterConfig, Scaling};
use super::error::AdapterError;
use super::init::is_part_of_the_weight;
use super::registry::AnyStructure;
use super::stack::{each_adapter, layer_of};
use super::structure::TensorRole;

/// How an adapter is trained. As JSON: `{"name": "lora-plus", "ratio": 16}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case", rename_all_fields = "snake_case", deny_unknown_fields)]
pub enum Rule {
    /// By the gradients as they are.
    #[default]
    Plain,
    /// B learns faster than A ("LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354).
    LoraPlus {
        /// Learning rate of B, and of vectors, as a multiple of that of A.
        #[serde(default = "sixteen")]
        ratio: f64,
    },
    /// A stays as it begins ("LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303).
    LoraFa {
        /// Whether the gradient of B is corrected so that the update follows the full gradient, with the Adam of `peft`.
        #[serde(default)]
        corrected: bool,
    },
    /// The update follows the full gradient ("LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242).
    LoraPro {
        /// Where the moments live.
        #[serde(default)]
        mode: LoraProMode,
        /// How the free part of the gradients is chosen.
        #[serde(default)]
        x_mode: LoraProX,
        /// Damping of the products of the factors with themselves.
        #[serde(default = "tiny")]
        delta: f64,
    },
    /// Outputs learn more slowly as their part of the update grows ("ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv
    /// 2410.09692).
    Allora {
        /// Factor of the learning rate of an output whose update is zero.
        #[serde(default = "four")]
        eta: f64,
        /// Whose norm it falls with.
        #[serde(default)]
        norm_of: NormOf,
    },
}

fn sixteen() -> f64 {
    16.0
}

fn four() -> f64 {
    4.0
}

fn tiny() -> f64 {
    1e-8
}

/// What lists tell of a rule.
#[derive(Clone, Copy, Debug)]
pub struct RuleEntry {
    /// Name in configurations.
    pub name: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// arXiv id.
    pub arxiv: &'static str,
    /// One line on what it does.
    pub summary: &'static str,
    /// Name, default and one line of each option.
    pub options: &'static [(&'static str, &'static str, &'static str)],
}

/// All training rules.
pub static RULES: &[RuleEntry] = &[
    RuleEntry {
        name: "plain",
        title: "LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv: "2106.09685",
        summary: "gradients as they are",
        options: &[],
    },
    RuleEntry {
        name: "lora-plus",
        title: "LoRA+: Efficient Low Rank Adaptation of Large Models",
        arxiv: "2402.12354",
        summary: "B learns faster than A",
        options: &[("ratio", "16", "learning rate of B and of vectors as a multiple of that of A, greater than 0")],
    },
    RuleEntry {
        name: "lora-fa",
        title: "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
        arxiv: "2308.03303",
        summary: "A stays as it begins",
        options: &[("corrected", "false", "whether the gradient of B is corrected toward the full one, as peft does")],
    },
    RuleEntry {
        name: "lora-pro",
        title: "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
        arxiv: "2407.18242",
        summary: "gradients whose common update lies closest to the full gradient",
        options: &[
            (
                "mode",
                "full",
                "where moments live: full (as for the whole weight), efficient (on the factors), sgd (nowhere)",
            ),
            ("x_mode", "sylvester", "use of what is left free: sylvester, symmetry, zero"),
            ("delta", "1e-8", "damping of the factors' products with themselves, greater than 0"),
        ],
    },
    RuleEntry {
        name: "allora",
        title: "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
        arxiv: "2410.09692",
        summary: "outputs learn more slowly as their part of the update grows; no scale, no dropout",
        options: &[
            ("eta", "4", "factor of the learning rate where the update is zero, greater than 0"),
            ("norm_of", "ba_row", "what an output's factor falls with: ba_row (its part of the product), b_row (of B)"),
        ],
    },
];

fn refused<T>(key: &str, value: impl ToString, reason: impl Into<String>) -> Result<T, AdapterError> {
    Err(AdapterError::Setting { key: key.into(), value: value.to_string(), reason: reason.into() })
}

impl Rule {
    /// The rule of a name with its defaults.
    pub fn named(name: &str) -> Result<Self, AdapterError> {
        serde_json::from_value(serde_json::json!({ "name": name })).map_err(|_| AdapterError::Setting {
            key: "rule".into(),
            value: name.into(),
            reason: format!("it must be one of {}", RULES.iter().map(|rule| rule.name).collect::<Vec<_>>().join(", ")),
        })
    }

    /// Its name in configurations.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::LoraPlus { .. } => "lora-plus",
            Self::LoraFa { .. } => "lora-fa",
            Self::LoraPro { .. } => "lora-pro",
            Self::Allora { .. } => "allora",
        }
    }

    /// The adapter's configuration as the rule needs it. Refuses values outside what the rule allows, and adapters it has no meaning for.
    pub fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        config.validate()?;
        let spec = config.entry()?.spec;
        let of_lora = |reason: &str| match config.structure.as_str() {
            "lora" => Ok(()),
            other => refused("rule", self.name(), format!("{reason}; {other} is another structure, take lora")),
        };
        match *self {
            Self::Plain => Ok(config),
            Self::LoraPlus { ratio } => {
                if !(ratio > 0.0 && ratio.is_finite()) {
                    return refused("ratio", ratio, "it must be greater than 0");
                }
                match spec.tensors.iter().any(|tensor| tensor.role == TensorRole::B) {
                    true => Ok(config),
                    false => refused("rule", self.name(), format!("{} has no factor B to learn faster", spec.name)),
                }
            }
            Self::LoraFa { .. } => {
                of_lora("it freezes A, and B's gradient follows from the plain product of the two")?;
                Ok(config)
            }
            Self::LoraPro { delta, .. } => {
                if !(delta > 0.0 && delta.is_finite()) {
                    return refused("delta", delta, "it must be greater than 0");
                }
                of_lora("it rests on gradients of A and B being those of a plain product")?;
                Ok(config)
            }
            Self::Allora { eta, norm_of } => {
                of_lora("it scales the rows of a plain product")?;
                check_eta(eta).map_err(refusal)?;
                if let Some(alpha) = config.alpha.filter(|alpha| Some(*alpha) != config.rank.map(|rank| rank as f64)) {
                    return refused("alpha", alpha, "allora has no scale: eta takes its place; take alpha away");
                }
                if !config.alpha_pattern.is_empty() {
                    return refused("alpha_pattern", "given", "allora has no scale: eta takes its place; take it away");
                }
                if config.scaling == Some(Scaling::RootRank) {
                    return refused("scaling", "root-rank", "allora has no scale: eta takes its place; take it away");
                }
                if config.dropout > 0.0 {
                    return refused("dropout", config.dropout, "allora does without dropout; take it away");
                }
                let config = AdapterConfig { structure: "allora".into(), alpha: None, scaling: None, ..config };
                let norm_of = serde_json::to_value(norm_of).unwrap_or_default();
                let config = config.with_option("eta", eta).with_option("norm_of", norm_of);
                config.validate()?;
                Ok(config)
            }
        }
    }

    /// What is allowed, but rarely meant.
    pub fn warnings(&self, config: &AdapterConfig) -> Vec<String> {
        let mut found = Vec::new();
        match self {
            Self::LoraPlus { ratio } if *ratio < 1.0 => {
                found.push(format!("lora-plus with ratio {ratio}: B learns more slowly than A; the method means 2 to 32"));
            }
            Self::LoraFa { .. } if is_part_of_the_weight(&config.init) => found.push(format!(
                "lora-fa freezes A: of the part of the weight that the start {} puts into the factors only B learns",
                config.init
            )),
            Self::LoraPro { .. } if config.dropout > 0.0 => found.push(format!(
                "lora-pro with dropout {}: the gradients of the factors follow from that of the weight in the mean only",
                config.dropout
            )),
            _ => {}
        }
        found
    }

    /// Freezes what the rule leaves as it begins.
    pub fn freeze<M: Module>(&self, module: M) -> M {
        if !matches!(self, Self::LoraFa { .. }) {
            return module;
        }
        let mut ids = Vec::new();
        each_adapter(&module, |_, adapter| {
            let tensors = adapter.stack.iter().flat_map(|attached| attached.shapes());
            ids.extend(tensors.filter(|tensor| tensor.role == TensorRole::A).map(|tensor| tensor.id));
        });
        module.freeze_group(ParamGroup::from_ids(ids))
    }

    /// Options of an optimizer as the rule needs them, on top of those given; refuses optimizers that the rule has no meaning with.
    pub fn options(&self, method: &str, mut options: Options) -> Result<Options, AdapterError> {
        let adamw = |why: &str| match method {
            "adamw" => Ok(()),
            other => {
                Err(AdapterError::Refused(format!("optimizer {other} with rule {}: {why}; take adamw", self.name())))
            }
        };
        let number = |options: &mut Options, key: &str, value: f64| {
            options.entry(key.into()).or_insert(OptionValue::Number(value));
        };
        match self {
            Self::LoraFa { corrected: true } => {
                adamw("the corrected gradient of B has an Adam of its own")?;
                number(&mut options, "beta_2", 0.999);
                number(&mut options, "epsilon", 1e-6);
                for key in ["legacy_epsilon", "decay_after"] {
                    options.entry(key.into()).or_insert(OptionValue::Flag(true));
                }
            }
            Self::LoraPro { mode, .. } => {
                adamw("its moments are those of Adam")?;
                number(&mut options, "beta_2", 0.999);
                let none = [OptionValue::Number(0.0), OptionValue::Count(0)];
                let decay = options.get("weight_decay").filter(|decay| !none.contains(decay));
                if let (LoraProMode::Sgd, Some(decay)) = (mode, decay) {
                    return refused(
                        "weight_decay",
                        decay,
                        "mode sgd takes steps along the gradients alone; set it to 0",
                    );
                }
                if *mode != LoraProMode::Efficient {
                    for key in ["legacy_epsilon", "decay_after", "lr_scale"] {
                        if let Some(value) = options.get(key) {
                            return refused(
                                key,
                                value,
                                "the factors are stepped by lora-pro itself, which has no such option",
                            );
                        }
                    }
                }
            }
            _ => {}
        }
        Ok(options)
    }

    /// The parameters that are trained, each as rule and structure would have it stepped.
    pub fn parameters<M: Module>(&self, module: &M) -> HiddenMatrices {
        let mut found = BTreeMap::new();
        each_adapter(module, |_, adapter| {
            for attached in &adapter.stack {
                for tensor in attached.shapes() {
                    found.insert(tensor.id, (tensor.role, attached.structure().lr_scale(&tensor.field)));
                }
            }
        });
        HiddenMatrices::of(module).trained(|parameter| self.tune(parameter, &found))
    }

    fn tune(&self, parameter: &mut Parameter, adapters: &BTreeMap<ParamId, (TensorRole, f64)>) {
        let role = adapters.get(&parameter.id).copied();
        let matrix = parameter.shape.len() == 2;
        if let Some((role, lr_scale)) = role {
            parameter.lr_scale = lr_scale;
            parameter.decays = role.decays();
            parameter.role = match (matrix, role.decays()) {
                (true, true) => Role::Hidden,
                (true, false) => Role::Excluded,
                (false, _) => Role::Other,
            };
        }
        match self {
            Self::LoraPlus { ratio }
                if parameter.shape.len() == 1 || role.is_some_and(|(role, _)| role == TensorRole::B) =>
            {
                parameter.lr_scale *= ratio;
            }
            Self::LoraPro { mode: LoraProMode::Full | LoraProMode::Sgd, .. }
                if role.is_some_and(|(role, _)| matches!(role, TensorRole::A | TensorRole::B)) =>
            {
                parameter.role = Role::Descent;
            }
            _ => {}
        }
    }

    /// What changes the gradients of this module between clipping and the optimizer; `options` as [`Rule::options`] gave them. Its states
    /// report to the meter.
    pub fn gradient_rule<M: Module>(
        &self,
        module: &M,
        options: &Options,
        meter: &StateMeter,
    ) -> Result<Option<GradientRule>, AdapterError> {
        match *self {
            Self::LoraFa { corrected: true } => Ok(Some(GradientRule::LoraFa(LoraFa::over(self.pairs(module)?)))),
            Self::LoraPro { mode, x_mode, delta } => {
                let mut config = LoraProConfig::new().with_mode(mode).with_x_mode(x_mode).with_delta(delta);
                if mode == LoraProMode::Full {
                    let given = |key: &str| match options.get(key) {
                        Some(OptionValue::Number(value)) => Some(*value),
                        Some(OptionValue::Count(value)) => Some(*value as f64),
                        _ => None,
                    };
                    config.beta_1 = given("beta_1").unwrap_or(config.beta_1);
                    config.beta_2 = given("beta_2").unwrap_or(config.beta_2);
                    config.epsilon = given("epsilon").unwrap_or(config.epsilon);
                    config.weight_decay = given("weight_decay").unwrap_or(config.weight_decay);
                }
                let rule = config.over(module, self.pairs(module)?, meter).map_err(refusal)?;
                if config.weight_decay > 0.0 {
                    refuse_parts(module, config.weight_decay)?;
                }
                Ok(Some(GradientRule::LoraPro(rule)))
            }
            _ => Ok(None),
        }
    }

    /// The pairs of factors that are trained.
    fn pairs<M: Module>(&self, module: &M) -> Result<Vec<LoraPair>, AdapterError> {
        let mut weights = BTreeMap::new();
        for parameter in HiddenMatrices::of(module).parameters() {
            weights.entry(layer_of(&parameter.path).to_string()).or_insert(parameter.id);
        }
        let mut pairs = Vec::new();
        let mut failed = None;
        each_adapter(module, |path, adapter| {
            for attached in &adapter.stack {
                let trained = |param: &Param<Tensor<2>>| param.is_require_grad();
                match (&attached.structure, weights.get(path)) {
                    (AnyStructure::Lora(lora), Some(weight)) if trained(&lora.b) => {
                        let (a, b, scale) = (lora.a.id, lora.b.id, lora.scale);
                        pairs.push(LoraPair { path: path.to_string(), weight: *weight, a, b, scale });
                        if !trained(&lora.a) && matches!(self, Self::LoraPro { .. }) {
                            failed =
                                Some(format!("A of {path} is frozen, and {} needs the gradients of both", self.name()));
                        }
                    }
                    (AnyStructure::Lora(lora), _) if !trained(&lora.a) => {}
                    (other, _) => {
                        let name = other.spec().name;
                        failed = Some(format!("the adapter of {path} is {name}, and {} is for lora", self.name()));
                    }
                }
            }
        });
        match failed {
            Some(reason) => Err(AdapterError::Refused(reason)),
            None => Ok(pairs),
        }
    }
}

fn refusal(error: OptimError) -> AdapterError {
    AdapterError::Refused(error.to_string())
}

/// Decay of the whole weight where more than a base and one product make it.
fn refuse_parts<M: Module>(module: &M, decay: f64) -> Result<(), AdapterError> {
    let mut found = None;
    each_adapter(module, |path, adapter| {
        if adapter.stack.len() > 1 || adapter.stack.iter().any(|attached| attached.origin.is_some()) {
            found = Some(path.to_string());
        }
    });
    match found {
        None => Ok(()),
        Some(path) => refused(
            "weight_decay",
            decay,
            format!("lora-pro decays the weight and one product, and {path} has more parts; set it to 0"),
        ),
    }
}

/// A pass over gradients that a [`Rule`] asks for.
#[derive(Clone, Debug)]
pub enum GradientRule {
    /// Corrects B.
    LoraFa(LoraFa),
    /// Adjusts both.
    LoraPro(LoraPro),
}

impl GradientRule {
    /// The gradients as the optimizer is to see them. They may be those of a part of the module.
    pub fn apply<M: Module>(&self, module: &M, grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        match self {
            Self::LoraFa(rule) => rule.apply(module, grads),
            Self::LoraPro(rule) => rule.apply(module, grads),
        }
    }

    /// Weight decay of the whole weight, base included; call it between [`GradientRule::apply`] and the optimizer. It does nothing where the
    /// optimizer decays.
    pub fn decay<M: Module>(&self, module: M, lr: f64) -> M {
        match self {
            Self::LoraFa(_) => module,
            Self::LoraPro(rule) => rule.decay(module, lr),
        }
    }

    /// What it keeps between steps, for a checkpoint; an empty record where it keeps nothing.
    pub fn to_record(&self) -> OptimizerRecord {
        match self {
            Self::LoraFa(_) => OptimizerRecord::default(),
            Self::LoraPro(rule) => rule.to_record(),
        }
    }

    /// Goes on from a record.
    pub fn load_record(&self, record: OptimizerRecord) {
        if let Self::LoraPro(rule) = self {
            rule.load_record(record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dense;
    use crate::adapter::{Attach, Targets};
    use crate::weights::host;
    use burn::tensor::{Device, TensorData};
    use lowrank_optim::Who;
    use lowrank_optim::registry::find;

    #[derive(Module, Debug)]
    struct Model {
        first: Dense,
        second: Dense,
    }

    fn model(config: &AdapterConfig) -> Model {
        let values = |count: usize| (0..count).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<f32>>();
        let weight = |shape: [usize; 2]| {
            let data = TensorData::new(values(shape[0] * shape[1]), shape);
            Dense::from_parts(Tensor::from_data(data, &Device::default().autodiff()), None)
        };
        let model = Model { first: weight([6, 8]), second: weight([8, 4]) };
        Attach::new(config.clone()).factored().to(model).unwrap().0
    }

    fn loss(model: &Model, step: u64) -> Tensor<1> {
        let values = (0..30).map(|i| ((i + 31 * step) as f32 * 1.3).cos()).collect::<Vec<f32>>();
        let x = Tensor::<2>::from_data(TensorData::new(values, [5, 6]), &Device::default().autodiff());
        model.second.forward(model.first.forward(x).tanh()).square().mean()
    }

    /// The values of all factors after some steps.
    fn trained(rule: Rule, options: &[(&str, f64)], steps: u64) -> Vec<Vec<f32>> {
        // ALLoRA has no scale but 1.
        let config = AdapterConfig::new("lora").with_rank(2).with_alpha(2.0);
        let mut model = rule.freeze(model(&rule.prepare(config).unwrap()));
        let given = options.iter().map(|(name, value)| (name.to_string(), OptionValue::Number(*value)));
        let options = rule.options("adamw", given.collect()).unwrap();
        let meter = StateMeter::new();
        let mut optimizer = find("adamw").unwrap().init(&options, &rule.parameters(&model), &meter).unwrap().0;
        let gradient_rule = rule.gradient_rule(&model, &options, &meter).unwrap();
        for step in 0..steps {
            let mut grads = GradientsParams::from_grads(loss(&model, step).backward(), &model);
            if let Some(rule) = &gradient_rule {
                grads = rule.apply(&model, grads).unwrap();
                model = rule.decay(model, 0.01);
            }
            model = optimizer.step(0.01, model, grads);
        }
        let mut found = Vec::new();
        each_adapter(&model, |_, adapter| {
            let factors = adapter.stack[0].structure().as_factors().unwrap();
            found.extend(factors.map(|factor| host(factor.inner())));
        });
        found
    }

    #[test]
    fn lora_plus_with_ratio_one_is_lora_bit_for_bit() {
        let plain = trained(Rule::Plain, &[("weight_decay", 0.1)], 4);
        assert_eq!(trained(Rule::LoraPlus { ratio: 1.0 }, &[("weight_decay", 0.1)], 4), plain);
        // Adam's first step is the learning rate, whatever the gradient.
        let moved = |ratio: f64| trained(Rule::LoraPlus { ratio }, &[("epsilon", 1e-30)], 1)[1][0].abs();
        assert!((moved(8.0) / moved(1.0) - 8.0).abs() < 1e-4);
    }

    #[test]
    fn lora_fa_leaves_a_and_keeps_no_state_for_it() {
        for corrected in [false, true] {
            let rule = Rule::LoraFa { corrected };
            let (before, after) = (trained(rule, &[], 0), trained(rule, &[], 4));
            assert_eq!((&before[0], &before[2]), (&after[0], &after[2]));
            assert_ne!((&before[1], &before[3]), (&after[1], &after[3]));
            let model = rule.freeze(model(&AdapterConfig::new("lora").with_rank(2)));
            let parameters = rule.parameters(&model);
            let paths: Vec<&str> = parameters.parameters().iter().map(|p| p.path.as_str()).collect();
            assert!(paths.len() == 2 && paths.iter().all(|path| path.ends_with(".b")), "{paths:?}");
        }
    }

    #[test]
    fn every_rule_trains_every_factor_that_it_is_meant_to() {
        for entry in RULES {
            let rule = Rule::named(entry.name).unwrap();
            assert_eq!(rule.name(), entry.name);
            let json = serde_json::to_value(rule).unwrap();
            assert_eq!(serde_json::from_value::<Rule>(json.clone()).unwrap(), rule);
            let mut names: Vec<&String> = json.as_object().unwrap().keys().filter(|key| *key != "name").collect();
            let mut listed: Vec<&str> = entry.options.iter().map(|(name, ..)| *name).collect();
            names.sort();
            listed.sort();
            assert_eq!(names, listed, "{} lists its options", entry.name);
            let (before, after) = (trained(rule, &[], 0), trained(rule, &[], 3));
            for (place, (before, after)) in before.iter().zip(&after).enumerate() {
                let frozen = entry.name == "lora-fa" && place % 2 == 0;
                assert_eq!(before == after, frozen, "{}: factor {place}", entry.name);
                assert!(after.iter().all(|value| value.is_finite()));
            }
        }
        assert!(Rule::named("lora-minus").unwrap_err().to_string().contains("lora-pro"));
    }

    #[test]
    fn what_a_rule_has_no_meaning_for_is_refused_with_the_reason() {
        let lora = || AdapterConfig::new("lora").with_rank(2);
        let pro = Rule::named("lora-pro").unwrap();
        let allora = Rule::named("allora").unwrap();
        let block = AdapterConfig::new("block-lora");
        let refusals: Vec<(Rule, AdapterConfig, &str)> = vec![
            (pro, block.clone(), "block-lora"),
            (Rule::LoraFa { corrected: false }, block.clone(), "block-lora"),
            (allora, block, "block-lora"),
            (Rule::LoraPro { mode: LoraProMode::Sgd, x_mode: LoraProX::Zero, delta: 0.0 }, lora(), "greater than 0"),
            (Rule::LoraPlus { ratio: 0.0 }, lora(), "greater than 0"),
            (Rule::Allora { eta: f64::NAN, norm_of: NormOf::BRow }, lora(), "eta"),
            (allora, lora().with_alpha(4.0), "alpha"),
            (allora, AdapterConfig { dropout: 0.1, ..lora() }, "dropout"),
            (allora, AdapterConfig { scaling: Some(Scaling::RootRank), ..lora() }, "no scale"),
            (allora, AdapterConfig { alpha_pattern: vec![("first".into(), 2.0)], ..lora() }, "no scale"),
            (Rule::Plain, lora().with_alpha(-1.0), "alpha"),
        ];
        for (rule, config, reason) in refusals {
            let error = rule.prepare(config).unwrap_err().to_string();
            assert!(error.contains(reason), "{}: {error}", rule.name());
        }
        assert!(allora.prepare(lora().with_alpha(2.0)).is_ok(), "alpha equal to the rank is no scale");
        for rule in [pro, Rule::LoraFa { corrected: true }] {
            assert!(rule.options("muon", Options::new()).unwrap_err().to_string().contains("adamw"));
        }
        assert_eq!(Rule::Plain.warnings(&lora()), Vec::<String>::new());
        assert_eq!(pro.warnings(&AdapterConfig { dropout: 0.1, ..lora() }).len(), 1);
        assert_eq!(
            Rule::LoraFa { corrected: false }.warnings(&AdapterConfig { init: "pissa".into(), ..lora() }).len(),
            1
        );
        assert_eq!(Rule::LoraPlus { ratio: 0.5 }.warnings(&lora()).len(), 1);
    }

    #[test]
    fn modes_without_moments_on_the_factors_take_descent_and_keep_no_state_in_the_optimizer() {
        let config = AdapterConfig::new("lora").with_rank(2).with_targets(Targets::parse("first"));
        for (mode, who, optimizer_bytes, rule_bytes) in [
            (LoraProMode::Full, Who::Descent, 0, 2 * 4 * 6 * 8),
            (LoraProMode::Efficient, Who::Method("adamw"), 2 * 4 * 2 * (6 + 8), 0),
            (LoraProMode::Sgd, Who::Descent, 0, 0),
        ] {
            let rule = Rule::LoraPro { mode, x_mode: LoraProX::Sylvester, delta: 1e-8 };
            let mut model = model(&rule.prepare(config.clone()).unwrap());
            let options = rule.options("adamw", Options::new()).unwrap();
            let meter = StateMeter::new();
            let (mut optimizer, report) =
                find("adamw").unwrap().init(&options, &rule.parameters(&model), &meter).unwrap();
            assert!(report.len() == 2 && report.iter().all(|stepped| stepped.who == who));
            let gradient_rule = rule.gradient_rule(&model, &options, &meter).unwrap().unwrap();
            let grads = GradientsParams::from_grads(loss(&model, 0).backward(), &model);
            meter.start();
            let grads = gradient_rule.apply(&model, grads).unwrap();
            assert_eq!(meter.stop(), rule_bytes);
            meter.start();
            model = optimizer.step(0.01, model, grads);
            assert_eq!(meter.stop(), optimizer_bytes);
            assert_eq!(gradient_rule.to_record().is_empty(), mode != LoraProMode::Full);
            assert!(loss(&model, 0).into_scalar::<f32>().is_finite());
        }
    }

    #[test]
    fn decay_of_the_whole_weight_is_refused_where_it_has_more_parts() {
        let rule = Rule::named("lora-pro").unwrap();
        let options = Options::from([("weight_decay".to_string(), OptionValue::Number(0.1))]);
        let options = rule.options("adamw", options).unwrap();
        let meter = StateMeter::new();
        let plain = AdapterConfig::new("lora").with_rank(2);
        assert!(rule.gradient_rule(&model(&plain), &options, &meter).is_ok());
        let pissa = AdapterConfig { init: "pissa".into(), ..plain.clone() };
        let error = rule.gradient_rule(&model(&pissa), &options, &meter).unwrap_err().to_string();
        assert!(error.contains("weight_decay"), "{error}");
        let half = Rule::LoraFa { corrected: false }.freeze(model(&plain));
        assert!(rule.gradient_rule(&half, &options, &meter).unwrap_err().to_string().contains("frozen"));
        let sgd = Rule::LoraPro { mode: LoraProMode::Sgd, x_mode: LoraProX::Sylvester, delta: 1e-8 };
        assert!(sgd.options("adamw", options).unwrap_err().to_string().contains("weight_decay = 0.1"));
    }

    #[test]
    fn decay_shrinks_the_base_and_its_product_as_one_weight() {
        let rule = Rule::named("lora-pro").unwrap();
        let options = Options::from([("weight_decay".to_string(), OptionValue::Number(0.5))]);
        let options = rule.options("adamw", options).unwrap();
        let model = model(&rule.prepare(AdapterConfig::new("lora").with_rank(2)).unwrap());
        let gradient_rule = rule.gradient_rule(&model, &options, &StateMeter::new()).unwrap().unwrap();
        // B begins at zero: some steps give the product a part in the weight.
        let mut optimizer =
            find("adamw").unwrap().init(&options, &rule.parameters(&model), &StateMeter::new()).unwrap().0;
        let grads = GradientsParams::from_grads(loss(&model, 0).backward(), &model);
        let model = optimizer.step(0.5, model, grads);
        let weights = |model: &Model| [&model.first, &model.second].map(|layer| host(layer.weight.val().inner()));
        let before = weights(&model);
        let after = gradient_rule.decay(model, 0.1);
        for (before, after) in before.iter().flatten().zip(weights(&after).iter().flatten()) {
            assert!((after - 0.95 * before).abs() <= 1e-6 * before.abs().max(1.0), "{before} became {after}");
        }
    }
}
