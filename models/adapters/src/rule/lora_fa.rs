//! LoRA-FA: A is frozen ("LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv
//! 2308.03303).

use lowrank_optim::registry::{Entry, Kind, OptionList, Options, Paper};
use lowrank_optim::rules::{GradientRule, LoraFa};
use lowrank_optim::{Part, StateMeter};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Rule, RuleEntry, of_lora, read, with_adamw};
use super::pairs::trained_pairs;
use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::spec::TensorRole;

pub(super) static ENTRY: RuleEntry = RuleEntry {
    entry: Entry {
        papers: &[Paper {
            title: "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
            place: "2308.03303",
        }],
        options: || OptionList::of(&LoraFaRule::default()),
        ..Entry::plain(Kind::Rule, "lora-fa", "A stays as it starts")
    },
    read: |options| read::<LoraFaRule>(&ENTRY, options),
};

/// Training rule LoRA-FA.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraFaRule {
    /// Correct the gradient of B so that the update follows the full gradient, as peft does.
    pub corrected: bool,
}

impl Rule for LoraFaRule {
    fn entry(&self) -> &'static RuleEntry {
        &ENTRY
    }

    fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        of_lora(self, &config, "it freezes A, and B's gradient follows from the plain product of the two")?;
        Ok(config)
    }

    fn warnings(&self, config: &AdapterConfig) -> Vec<String> {
        match config.initialisation().is_some_and(|init| init.starts_from_weight) {
            true => vec![format!(
                "lora-fa freezes A: of the part of the weight that the start {} puts into the factors only B learns",
                config.init
            )],
            false => Vec::new(),
        }
    }

    fn freezes(&self, role: TensorRole) -> bool {
        role == TensorRole::A
    }

    fn options(&self, method: &str, mut options: Options) -> Result<Options, AdapterError> {
        if self.corrected {
            with_adamw(self, method, "whose corrected gradient of B has an Adam of its own")?;
            options.entry("beta_2").or_insert(0.999.into());
            options.entry("epsilon").or_insert(1e-6.into());
            for key in ["legacy_epsilon", "decay_after"] {
                options.entry(key).or_insert(true.into());
            }
        }
        Ok(options)
    }

    fn gradients(
        &self,
        part: &dyn Part,
        _: &Options,
        _: &StateMeter,
    ) -> Result<Option<Box<dyn GradientRule>>, AdapterError> {
        match self.corrected {
            true => Ok(Some(Box::new(LoraFa::over(trained_pairs(self, part, false)?)))),
            false => Ok(None),
        }
    }
}
