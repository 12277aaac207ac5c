//! Kinds of runs, and the keys of each.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Kind of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Job {
    /// A model learns from text.
    #[default]
    Pretrain,
    /// A model that exists learns from examples, by an adapter or whole.
    Finetune,
}

impl Job {
    /// Name of the command.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pretrain => "pretrain",
            Self::Finetune => "finetune",
        }
    }

    /// Returns true if the key is supported in such a run.
    pub fn knows(self, key: &str) -> bool {
        let others: &[&str] = match self {
            Self::Pretrain => &[
                "adapter.",
                "rule.",
                "allocation.",
                "weights.base",
                "data.learn_prompt",
                "data.packing",
                "data.too_long",
            ],
            Self::Finetune => &["model.", "tokenizer.", "data.verify", "train.tokens"],
        };
        key == "model.name" || !others.iter().any(|start| key.starts_with(start))
    }
}
