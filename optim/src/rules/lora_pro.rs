//! LoRA-Pro ("LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242).

use serde::{Deserialize, Serialize};

/// Where the moments of LoRA-Pro live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraProMode {
    /// On the equivalent gradient of the weight, in the rule: `2 d_in d_out` values a layer, as full fine-tuning has. The gradients that it gives
    /// are steps: the factors take plain descent ([`SgdConfig`](burn::optim::SgdConfig) without momentum).
    #[default]
    Full,
    /// On the factors, in the optimizer, which is AdamW: `2 r (d_in + d_out)` values a layer.
    Efficient,
    /// Nowhere: the factors take plain descent.
    Sgd,
}

/// How the freedom that the equivalent gradient leaves is used; the step of the merged weight is the same to first order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraProX {
    /// The gradients lie as close to the plain ones as they can.
    #[default]
    Sylvester,
    /// Both factors take the same part of what they share.
    Symmetry,
    /// It is not used.
    Zero,
}
