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

mod choice;
mod gradients;
mod list;
#[cfg(test)]
mod tests;

pub use self::choice::Rule;
pub use self::gradients::GradientRule;
pub use self::list::RULES;
