//! List of training rules, one line each.

use lowrank_optim::registry::{Kind, Options, find};

use super::definition::{Rule, RuleEntry};
use super::plain::PlainRule;
use super::{allora, lora_fa, lora_plus, lora_pro, plain};
use crate::ground::error::AdapterError;

/// All training rules of this crate.
pub static RULES: &[&RuleEntry] =
    &[&plain::ENTRY, &lora_plus::ENTRY, &lora_fa::ENTRY, &lora_pro::ENTRY, &allora::ENTRY];

impl Default for Box<dyn Rule> {
    fn default() -> Self {
        Box::new(PlainRule::default())
    }
}

impl dyn Rule {
    /// Returns the rule with this name and the given options on top of its defaults.
    pub fn named(name: &str, options: &Options) -> Result<Box<Self>, AdapterError> {
        let entry = find(Kind::Rule, RULES.iter().copied(), name)?;
        (entry.read)(options)
    }
}
