//! The training rules by name, with their options.

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use lowrank_optim::rules::{LoraProMode, LoraProX, NormOf};
use schemars::JsonSchema;
use serde::Serialize;

#[derive(Serialize, JsonSchema)]
struct LoraPlus {
    /// Learning rate of B and of vectors as a multiple of that of A.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    ratio: f64,
}

#[derive(Serialize, JsonSchema)]
struct LoraFa {
    /// Corrects the gradient of B toward the full one, as peft does.
    corrected: bool,
}

#[derive(Serialize, JsonSchema)]
struct LoraPro {
    /// Tensors that the moments belong to.
    mode: LoraProMode,
    /// Use of the freedom that the equivalent gradient leaves.
    x_mode: LoraProX,
    /// Damping of the factors' products with themselves.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    delta: f64,
}

#[derive(Serialize, JsonSchema)]
struct Allora {
    /// Learning-rate factor of an output whose update is zero.
    #[schemars(range(max = 1e9), extend("exclusiveMinimum" = 0.0))]
    eta: f64,
    /// Norm that the factor of an output falls with.
    norm_of: NormOf,
}

/// All training rules.
pub static RULES: &[Entry] = &[
    Entry {
        papers: &[Paper { title: "LoRA: Low-Rank Adaptation of Large Language Models", place: "2106.09685" }],
        ..Entry::plain(Kind::Rule, "plain", "gradients as they are")
    },
    Entry {
        papers: &[Paper { title: "LoRA+: Efficient Low Rank Adaptation of Large Models", place: "2402.12354" }],
        options: || OptionList::of(&LoraPlus { ratio: 16.0 }),
        ..Entry::plain(Kind::Rule, "lora-plus", "B learns faster than A")
    },
    Entry {
        papers: &[Paper {
            title: "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
            place: "2308.03303",
        }],
        options: || OptionList::of(&LoraFa { corrected: false }),
        ..Entry::plain(Kind::Rule, "lora-fa", "A stays as it begins")
    },
    Entry {
        papers: &[Paper { title: "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", place: "2407.18242" }],
        options: || OptionList::of(&LoraPro { mode: LoraProMode::Full, x_mode: LoraProX::Sylvester, delta: 1e-8 }),
        ..Entry::plain(Kind::Rule, "lora-pro", "gradients whose common update lies closest to the full gradient")
    },
    Entry {
        papers: &[Paper { title: "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", place: "2410.09692" }],
        options: || OptionList::of(&Allora { eta: 4.0, norm_of: NormOf::BaRow }),
        ..Entry::plain(
            Kind::Rule,
            "allora",
            "outputs learn more slowly as their part of the update grows; no scale, no dropout",
        )
    },
];
