//! The training rules and what they ask of an adapter, its optimizer and its parameters.

use std::collections::BTreeMap;

use burn::module::{Module, ParamGroup, ParamId};
use lowrank_optim::registry::{Kind, OptionError, Options, find};
use lowrank_optim::rules::{LoraProMode, LoraProX, NormOf};
use lowrank_optim::{HiddenMatrices, OptimError, Parameter, Role};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::list::RULES;
use crate::ground::config::{AdapterConfig, Scaling};
use crate::ground::error::AdapterError;
use crate::ground::spec::TensorRole;
use crate::ground::stack::each_adapter;
use crate::init::factors::is_part_of_the_weight;

/// Training rule of an adapter. As JSON: `{"name": "lora-plus", "ratio": 16}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case", rename_all_fields = "snake_case", deny_unknown_fields)]
pub enum Rule {
    /// By the gradients as they are.
    #[default]
    Plain,
    /// B learns faster than A ("LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354).
    LoraPlus {
        /// Learning rate of B, and of vectors, as a multiple of that of A.
        ratio: f64,
    },
    /// A stays as it begins ("LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303).
    LoraFa {
        /// Corrects the gradient of B so that the update follows the full gradient, with the Adam of `peft`.
        corrected: bool,
    },
    /// The update follows the full gradient ("LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242).
    LoraPro {
        /// Tensors that the moments belong to.
        mode: LoraProMode,
        /// Use of the freedom that the equivalent gradient leaves.
        x_mode: LoraProX,
        /// Damping of the products of the factors with themselves.
        delta: f64,
    },
    /// Outputs learn more slowly as their part of the update grows ("ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv
    /// 2410.09692).
    Allora {
        /// Factor of the learning rate of an output whose update is zero.
        eta: f64,
        /// Whose norm it falls with.
        norm_of: NormOf,
    },
}

pub(super) fn refused<T>(key: &str, value: impl ToString, reason: impl Into<String>) -> Result<T, AdapterError> {
    Err(AdapterError::Setting { key: key.into(), value: value.to_string(), reason: reason.into() })
}

impl Rule {
    /// The rule of a name with its defaults.
    pub fn named(name: &str) -> Result<Self, AdapterError> {
        Self::of(name, &Options::new())
    }

    /// The rule of a name with the given options on top of its defaults.
    pub fn of(name: &str, options: &Options) -> Result<Self, AdapterError> {
        let entry = find(Kind::Rule, RULES, name)?;
        let list = entry.options();
        let under = |error: OptionError| error.under("rule.options");
        list.check(name, options).map_err(under)?;
        let defaults = list.iter().filter_map(|option| Some((option.name.clone(), option.default.clone()?)));
        let mut values: Options = defaults.chain(options.clone()).collect();
        values.insert("name".into(), name.into());
        serde_json::from_value(values.clone().into())
            .map_err(|error| under(OptionError::value("options", Value::Object(values), error.to_string())).into())
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

    /// Refuses values outside what its options allow.
    fn validate(&self) -> Result<(), AdapterError> {
        let Ok(Value::Object(mut options)) = serde_json::to_value(self) else { return Ok(()) };
        options.remove("name");
        let entry = find(Kind::Rule, RULES, self.name())?;
        Ok(entry.check(&options).map_err(|error| error.under("rule.options"))?)
    }

    /// The adapter's configuration as the rule needs it. Refuses values outside what the rule allows, and adapters it has no meaning for.
    pub fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        config.validate()?;
        self.validate()?;
        let spec = config.entry()?.spec;
        let of_lora = |reason: &str| match config.structure.as_str() {
            "lora" => Ok(()),
            other => refused("rule.name", self.name(), format!("{reason}; {other} is another structure, take lora")),
        };
        match *self {
            Self::Plain => Ok(config),
            Self::LoraPlus { .. } => match spec.tensors.iter().any(|tensor| tensor.role == TensorRole::B) {
                true => Ok(config),
                false => refused("rule.name", self.name(), format!("{} has no factor B to learn faster", spec.name)),
            },
            Self::LoraFa { .. } => {
                of_lora("it freezes A, and B's gradient follows from the plain product of the two")?;
                Ok(config)
            }
            Self::LoraPro { .. } => {
                of_lora("it rests on gradients of A and B being those of a plain product")?;
                Ok(config)
            }
            Self::Allora { eta, norm_of } => {
                of_lora("it scales the rows of a plain product")?;
                if let Some(alpha) = config.alpha.filter(|alpha| Some(*alpha) != config.rank.map(|rank| rank as f64)) {
                    return refused(
                        "adapter.alpha",
                        alpha,
                        "allora has no scale: eta takes its place; take alpha away",
                    );
                }
                if !config.alpha_pattern.is_empty() {
                    return refused(
                        "adapter.alpha_pattern",
                        "given",
                        "allora has no scale: eta takes its place; take it away",
                    );
                }
                if config.scaling == Some(Scaling::RootRank) {
                    return refused(
                        "adapter.scaling",
                        "root-rank",
                        "allora has no scale: eta takes its place; take it away",
                    );
                }
                if config.dropout > 0.0 {
                    return refused("adapter.dropout", config.dropout, "allora does without dropout; take it away");
                }
                let config = AdapterConfig { structure: "allora".into(), alpha: None, scaling: None, ..config };
                let norm_of = serde_json::to_value(norm_of).unwrap_or_default();
                let config = config.with_option("eta", eta).with_option("norm_of", norm_of);
                config.validate()?;
                Ok(config)
            }
        }
    }

    /// Warnings about settings that are allowed but rarely intended.
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
            options.entry(key).or_insert(value.into());
        };
        match self {
            Self::LoraFa { corrected: true } => {
                adamw("the corrected gradient of B has an Adam of its own")?;
                number(&mut options, "beta_2", 0.999);
                number(&mut options, "epsilon", 1e-6);
                for key in ["legacy_epsilon", "decay_after"] {
                    options.entry(key).or_insert(true.into());
                }
            }
            Self::LoraPro { mode, .. } => {
                adamw("its moments are those of Adam")?;
                number(&mut options, "beta_2", 0.999);
                let decay = options.get("weight_decay").filter(|decay| decay.as_f64() != Some(0.0));
                if let (LoraProMode::Sgd, Some(decay)) = (mode, decay) {
                    return refused(
                        "optimizer.weight_decay",
                        decay,
                        "mode sgd takes steps along the gradients alone; set it to 0",
                    );
                }
                if *mode != LoraProMode::Efficient {
                    for key in ["legacy_epsilon", "decay_after", "lr_scale"] {
                        if let Some(value) = options.get(key) {
                            return refused(
                                &format!("optimizer.options.{key}"),
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
}

pub(super) fn refusal(error: OptimError) -> AdapterError {
    AdapterError::Refused(error.to_string())
}
