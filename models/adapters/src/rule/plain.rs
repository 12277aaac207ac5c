//! The plain rule, which leaves gradients unchanged.

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Rule, RuleEntry, read};

pub(super) static ENTRY: RuleEntry = RuleEntry {
    entry: Entry {
        papers: &[Paper { title: "LoRA: Low-Rank Adaptation of Large Language Models", place: "2106.09685" }],
        options: || OptionList::of(&PlainRule::default()),
        ..Entry::plain(Kind::Rule, "plain", "gradients as they are")
    },
    read: |options| read::<PlainRule>(&ENTRY, options),
};

/// Trains an adapter by its gradients as they are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlainRule {}

impl Rule for PlainRule {
    fn entry(&self) -> &'static RuleEntry {
        &ENTRY
    }

    fn trains_weights(&self) -> bool {
        true
    }
}
