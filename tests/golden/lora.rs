//! LoRA against reference values.

use super::interop_peft;
use super::support::case::{Case, Outcome};
use super::support::factors::{FACTORS, config, gradients, training};
use super::support::rules;

pub fn run(case: &Case) -> Outcome {
    if case.names().iter().any(|name| name.starts_with("merged.")) {
        return interop_peft::folder(case);
    }
    match (case.has("grad_output"), case.config["variant"].as_str()) {
        (true, _) => gradients(case, &config(case, "lora")?, FACTORS),
        (_, Some("lora")) => training(case, &config(case, "lora")?, FACTORS, &[]),
        (_, Some(_)) => rules::lora(case, &config(case, "lora")?),
        _ => Err("is of no known kind".into()),
    }
}
