//! Gradient rules: passes over the gradients of a whole module, between the backward pass and the optimizer.
//!
//! A rule takes [`GradientsParams`](burn::optim::GradientsParams) and gives [`GradientsParams`](burn::optim::GradientsParams), so that it works
//! in a hand-written loop and, in one line, in an overridden [`TrainStep::optimize`](burn::train::TrainStep::optimize).

mod allora;
mod gradient_rule;
mod lora_fa;
mod lora_pro;
mod multiply;
mod pairs;

pub use allora::{AlloraRowsOnly, NormOf, check_eta, output_lr_scales};
pub use gradient_rule::GradientRule;
pub use lora_fa::LoraFa;
pub use lora_pro::{LoraPro, LoraProConfig, LoraProMode, LoraProX};
pub use pairs::LoraPair;
