//! Row factors of ALLoRA ("ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692).

use serde::{Deserialize, Serialize};

/// Which row's norm an output's learning rate falls with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormOf {
    /// That of the product.
    #[default]
    BaRow,
    /// That of the factor at the output, which is cheaper.
    BRow,
}
