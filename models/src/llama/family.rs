//! Families of models that one module covers, and the parts in which they differ.

use serde::{Deserialize, Serialize};

use crate::error::ModelError;

/// Family of a model, which its files name under `model_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// LLaMA 1 to 3.3, SmolLM and SmolLM2 ("LLaMA: Open and Efficient Foundation Language Models", arXiv 2302.13971).
    #[default]
    Llama,
    /// Mistral: attention within a window ("Mistral 7B", arXiv 2310.06825).
    Mistral,
    /// Qwen2 and Qwen2.5: biases of queries, keys and values ("Qwen2 Technical Report", arXiv 2407.10671).
    Qwen2,
    /// Qwen3: a norm of each query and key head ("Qwen3 Technical Report", arXiv 2505.09388).
    Qwen3,
    /// SmolLM3: layers without rotary positions ("Rope to Nope and Back Again: A New Hybrid Attention Strategy", arXiv 2501.18795).
    SmolLm3,
    /// OLMo 2: norms after the parts of a block ("2 OLMo 2 Furious", arXiv 2501.00656).
    Olmo2,
    /// Granite 3: multipliers of embedding, residuals, scores and logits ("Granite 3.0 Language Models").
    Granite,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 7] =
        [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::SmolLm3, Self::Olmo2, Self::Granite];

    /// Its `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::SmolLm3 => "smollm3",
            Self::Olmo2 => "olmo2",
            Self::Granite => "granite",
        }
    }

    /// Name of its language model in `transformers`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::SmolLm3 => "SmolLM3ForCausalLM",
            Self::Olmo2 => "Olmo2ForCausalLM",
            Self::Granite => "GraniteForCausalLM",
        }
    }

    /// Ids of special tokens that `transformers` uses where a `config.json` names none, of families with large ones.
    pub fn default_tokens(self) -> &'static [(&'static str, usize)] {
        match self {
            Self::SmolLm3 => &[("pad_token_id", 128_004), ("bos_token_id", 128_000), ("eos_token_id", 128_001)],
            Self::Olmo2 => &[("eos_token_id", 50_279)],
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 | Self::Granite => &[],
        }
    }

    /// The family with this `model_type`.
    pub fn of_model_type(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.model_type() == name)
    }

    /// Returns true for LLaMA.
    pub fn is_llama(&self) -> bool {
        *self == Self::Llama
    }

    /// Parts that every model of the family has.
    pub fn features(self) -> Features {
        let llama = Features::default();
        match self {
            Self::Qwen2 => Features { qkv_bias: true, ..llama },
            Self::Qwen3 => Features { head_norms: Some(HeadNorms::EachHead), ..llama },
            Self::Olmo2 => Features { head_norms: Some(HeadNorms::AllHeads), norms_after: true, ..llama },
            Self::Granite => Features { attention_multiplier: Some(1.0), ..llama },
            Self::Llama | Self::Mistral | Self::SmolLm3 => llama,
        }
    }
}

/// RMS norms of queries and keys before the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadNorms {
    /// Each head by itself, with one gain for all heads `[head_dim]`.
    EachHead,
    /// All heads at once `[heads * head_dim]`.
    AllHeads,
}

/// Parts and constants in which the families differ. The default is LLaMA's: what is absent costs nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Features {
    /// Biases of queries, keys and values.
    pub qkv_bias: bool,
    /// Bias of the attention's output.
    pub output_bias: bool,
    /// Biases of the feed-forward part.
    pub mlp_bias: bool,
    /// Norms of queries and keys.
    pub head_norms: Option<HeadNorms>,
    /// Norms after attention and feed-forward part, inside the residual connection, in place of those before.
    pub norms_after: bool,
    /// Number of positions that a token sees, itself included; none for all earlier ones.
    pub sliding_window: Option<usize>,
    /// Layers, from 0, that see all earlier positions although there is a window; ascending.
    pub full_layers: Vec<usize>,
    /// Layers, from 0, without rotary positions; ascending.
    pub unrotated_layers: Vec<usize>,
    /// Factor of the embedding; none for 1.
    pub embedding_multiplier: Option<f64>,
    /// Factor of attention and feed-forward part before they are added to the residual stream; none for 1.
    pub residual_multiplier: Option<f64>,
    /// Factor of the attention scores; none for `1 / sqrt(head_dim)`.
    pub attention_multiplier: Option<f64>,
    /// Divisor of the logits; none for 1.
    pub logits_scaling: Option<f64>,
}

impl Features {
    /// Returns true if the model is a plain LLaMA.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// Window of a layer, counted from 0.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| !self.full_layers.contains(&layer))
    }

    /// Returns true if a layer, counted from 0, rotates queries and keys.
    pub fn rotates(&self, layer: usize) -> bool {
        !self.unrotated_layers.contains(&layer)
    }

    /// Rejects values that no model can have, naming the field.
    pub(super) fn validate(&self) -> Result<(), ModelError> {
        if self.sliding_window == Some(0) {
            let reason = "sliding_window is 0; a token sees itself at least: write 1 or more, or null for no window";
            return Err(ModelError::Config(reason.into()));
        }
        for (field, value) in [
            ("embedding_multiplier", self.embedding_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("attention_multiplier", self.attention_multiplier),
            ("logits_scaling", self.logits_scaling),
        ] {
            if let Some(value) = value
                && !(value.is_finite() && value > 0.0)
            {
                return Err(ModelError::Config(format!("{field} is {value}; it must be greater than 0")));
            }
        }
        Ok(())
    }
}
