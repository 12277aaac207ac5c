//! Training rules: how the tensors of an adapter are trained. Each has a file of its own.
//!
//! A training loop calls the rule in this order:
//!
//! ```text
//! rule.prepared(config)            the adapter's configuration as the rule needs it, or why not; rule.warnings(&config)
//! Attach::new(config).to(model)
//! rule.freeze(model)               factors that stay as they start
//! rule.options(method, options)    options of the optimizer, or why this optimizer is not supported
//! rule.parameters(&model)          for registry::Method::init(&options, &parameters, &meter)
//! rule.gradients(&model, ..)       a pass over gradients, where there is one: a hook of the trainer, or of a loop of your own
//! ```
//!
//! To add a rule, write its file and a line in [`RULES`].

mod allora;
mod definition;
mod list;
mod lora_fa;
mod lora_plus;
mod lora_pro;
mod pairs;
mod plain;
#[cfg(test)]
mod tests;

pub use allora::AlloraRule;
pub use definition::{Rule, RuleEntry};
pub use list::RULES;
pub use lora_fa::LoraFaRule;
pub use lora_plus::LoraPlusRule;
pub use lora_pro::LoraProRule;
pub use plain::PlainRule;
