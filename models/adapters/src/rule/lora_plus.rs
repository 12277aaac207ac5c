//! LoRA+: B has a higher learning rate than A ("LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv
//! 2402.12354).

use lowrank_optim::Parameter;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Rule, RuleEntry, read, refused};
use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::spec::TensorRole;

pub(super) static ENTRY: RuleEntry = RuleEntry {
    entry: Entry {
        papers: &[Paper { title: "LoRA+: Efficient Low Rank Adaptation of Large Models", place: "2402.12354" }],
        options: || OptionList::of(&LoraPlusRule::default()),
        ..Entry::plain(Kind::Rule, "lora-plus", "B learns faster than A")
    },
    read: |options| read::<LoraPlusRule>(&ENTRY, options),
};

/// Training rule LoRA+.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraPlusRule {
    /// Learning rate of B, and of vectors, as a multiple of that of A.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub ratio: f64,
}

impl Default for LoraPlusRule {
    fn default() -> Self {
        Self { ratio: 16.0 }
    }
}

impl Rule for LoraPlusRule {
    fn entry(&self) -> &'static RuleEntry {
        &ENTRY
    }

    fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        if !(self.ratio > 0.0 && self.ratio.is_finite()) {
            return refused("rule.options.ratio", self.ratio, "it must be greater than 0");
        }
        let spec = config.entry()?.spec;
        match spec.tensors.iter().any(|tensor| tensor.role == TensorRole::B) {
            true => Ok(config),
            false => refused("rule.name", "lora-plus", format!("{} has no factor B to learn faster", spec.name)),
        }
    }

    fn warnings(&self, _: &AdapterConfig) -> Vec<String> {
        match self.ratio {
            ratio if ratio < 1.0 => {
                vec![format!("lora-plus with ratio {ratio}: B learns more slowly than A; the method means 2 to 32")]
            }
            _ => Vec::new(),
        }
    }

    fn tune(&self, parameter: &mut Parameter, role: Option<TensorRole>) {
        if parameter.shape.len() == 1 || role == Some(TensorRole::B) {
            parameter.lr_scale *= self.ratio;
        }
    }
}
