//! Architectures of GGUF files, and the families whose models they hold.
//!
//! An architecture decides on the order of the rows of queries and keys and on the tensors of a block. What a model has beyond it would be
//! read by other programs as if it were not there; such a model is rejected.

use crate::error::ModelError;
use crate::llama::{Family, LlamaConfig, RopeScaling};

/// An architecture.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Architecture {
    /// Name in files, and prefix of the model's keys.
    pub name: &'static str,
    /// Family that its models are read as.
    pub family: Family,
    /// Queries and keys are stored for a rotation of neighbouring values; otherwise of the halves of a head, as in Hugging Face's files.
    pub neighbours: bool,
    /// A file may have biases of attention and feed-forward part, and a tensor of divisors of the frequencies, which its keys do not state.
    pub optional_parts: bool,
}

const ARCHITECTURES: [Architecture; 6] = [
    Architecture { name: "llama", family: Family::Llama, neighbours: true, optional_parts: true },
    Architecture { name: "qwen2", family: Family::Qwen2, neighbours: false, optional_parts: false },
    Architecture { name: "qwen3", family: Family::Qwen3, neighbours: false, optional_parts: false },
    Architecture { name: "smollm3", family: Family::SmolLm3, neighbours: true, optional_parts: false },
    Architecture { name: "olmo2", family: Family::Olmo2, neighbours: false, optional_parts: false },
    Architecture { name: "granite", family: Family::Granite, neighbours: true, optional_parts: true },
];

impl Architecture {
    /// The names that can be read.
    pub fn known() -> String {
        ARCHITECTURES.iter().map(|architecture| architecture.name).collect::<Vec<_>>().join(", ")
    }

    pub fn named(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name)
    }

    /// The architecture of a model's family: a mistral is a llama to other programs.
    pub fn of(config: &LlamaConfig) -> &'static Self {
        let family = if config.family == Family::Mistral { Family::Llama } else { config.family };
        ARCHITECTURES.iter().find(|architecture| architecture.family == family).unwrap_or(&ARCHITECTURES[0])
    }

    /// Layers without rotary positions, which no key states.
    pub fn unrotated(&self, layers: usize) -> Vec<usize> {
        match self.family {
            Family::SmolLm3 => (0..layers).filter(|layer| (layer + 1).is_multiple_of(4)).collect(),
            _ => Vec::new(),
        }
    }

    /// Rejects a model that other programs would compute otherwise.
    pub fn check(&self, config: &LlamaConfig) -> Result<(), ModelError> {
        let features = &config.features;
        let refuse = |reason: String| {
            let family = config.family.model_type();
            Err(ModelError::Config(format!("{reason}, which GGUF has no place for in models of type {family}")))
        };
        if let Some(window) = features.sliding_window.filter(|window| *window < config.max_position_embeddings)
            && features.full_layers.len() < config.num_hidden_layers
        {
            return Err(ModelError::Config(format!(
                "sliding_window is {window}, which GGUF has no key for; set max_position_embeddings to {window} to export the model for texts within \
                 its window"
            )));
        }
        let usual = self.family.features();
        let biases = [
            ("attention_bias", features.qkv_bias && !usual.qkv_bias),
            ("attention_bias", features.output_bias),
            ("mlp_bias", features.mlp_bias),
        ];
        if let Some((key, _)) = biases.into_iter().find(|(_, present)| *present && !self.optional_parts) {
            return refuse(format!("{key} is true"));
        }
        let unrotated = self.unrotated(config.num_hidden_layers);
        if features.unrotated_layers != unrotated {
            return refuse(format!(
                "the layers {:?} do not rotate; other programs take {unrotated:?}",
                features.unrotated_layers
            ));
        }
        if matches!(config.rope_scaling, Some(RopeScaling::Llama3 { .. })) && !self.optional_parts {
            return refuse("the rotary scaling is llama3".into());
        }
        Ok(())
    }
}
