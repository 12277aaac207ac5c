//! ALLoRA: the learning rate of an output falls as its part of the update grows ("ALLoRA: Adaptive Learning Rate
//! Mitigates LoRA Fatal Flaws", arXiv 2410.09692). The rule is implemented as a structure, whose backward pass scales
//! the gradients.

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use lowrank_optim::rules::{NormOf, check_eta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Rule, RuleEntry, of_lora, read, refusal, refused};
use crate::ground::config::{AdapterConfig, Scaling};
use crate::ground::error::AdapterError;

pub(super) static ENTRY: RuleEntry = RuleEntry {
    entry: Entry {
        papers: &[Paper { title: "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", place: "2410.09692" }],
        options: || OptionList::of(&AlloraRule::default()),
        ..Entry::plain(
            Kind::Rule,
            "allora",
            "outputs learn more slowly as their part of the update grows; no scale, no dropout",
        )
    },
    read: |options| read::<AlloraRule>(&ENTRY, options),
};

/// Training rule ALLoRA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AlloraRule {
    /// Factor of the learning rate of an output whose update is zero.
    #[schemars(range(max = 1e9), extend("exclusiveMinimum" = 0.0))]
    pub eta: f64,
    /// Norm that an output's factor falls with: ba_row (its part of the product), b_row (of B).
    pub norm_of: NormOf,
}

impl Default for AlloraRule {
    fn default() -> Self {
        Self { eta: 4.0, norm_of: NormOf::default() }
    }
}

impl Rule for AlloraRule {
    fn entry(&self) -> &'static RuleEntry {
        &ENTRY
    }

    fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        of_lora(self, &config, "it scales the rows of a plain product")?;
        check_eta(self.eta).map_err(refusal)?;
        let no_scale = "allora has no scale, eta takes its place; remove it";
        if let Some(alpha) = config.alpha.filter(|alpha| Some(*alpha) != config.rank.map(|rank| rank as f64)) {
            return refused("adapter.alpha", alpha, no_scale);
        }
        if !config.alpha_pattern.is_empty() {
            return refused("adapter.alpha_pattern", "given", no_scale);
        }
        if config.scaling == Some(Scaling::RootRank) {
            return refused("adapter.scaling", "root-rank", no_scale);
        }
        if config.dropout > 0.0 {
            return refused("adapter.dropout", config.dropout, "allora does without dropout; remove it");
        }
        let config = AdapterConfig { structure: "allora".into(), alpha: None, scaling: None, ..config };
        let norm_of = serde_json::to_value(self.norm_of).unwrap_or_default();
        let config = config.with_option("eta", self.eta).with_option("norm_of", norm_of);
        config.validate()?;
        Ok(config)
    }
}
