//! Configuration of a LLaMA model, with the field names of Hugging Face's `config.json`.

use serde::{Deserialize, Serialize};

use super::family::{Family, Features, HeadNorms};
use super::rope::RopeScaling;
use crate::error::ModelError;
use crate::linear::Parameterization;

/// Shape and constants of a LLaMA model.
///
/// The fields have the names and meanings of Hugging Face's `LlamaConfig`; the parts that only some families have are in [`Features`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// Family whose files the model is read from and written to.
    #[serde(default, skip_serializing_if = "Family::is_llama")]
    pub family: Family,
    /// Number of token ids, rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the SwiGLU feed-forward part.
    pub intermediate_size: usize,
    /// Number of decoder blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; fewer than query heads means grouped-query attention.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence the model is meant for, in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Change of the rotary angles; none for the usual ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Constant added to the mean square in RMS norm.
    pub rms_norm_eps: f64,
    /// Use the transposed embedding as output head.
    pub tie_word_embeddings: bool,
    /// Standard deviation of the normal distribution that weights start from.
    pub initializer_range: f64,
    /// Parts that a plain LLaMA does not have.
    #[serde(default, skip_serializing_if = "Features::is_plain")]
    pub features: Features,
    /// Parameterization of the linear layers of the blocks.
    #[serde(default, skip_serializing_if = "Parameterization::is_dense")]
    pub parameterization: Parameterization,
}

/// Shapes used by the papers on memory-efficient pretraining: name, hidden, intermediate, heads, layers, positions.
const SHAPES: &[(&str, [usize; 5])] = &[
    ("llama-9m", [128, 352, 4, 4, 1024]),
    ("llama-20m", [256, 688, 4, 4, 1024]),
    ("llama-35m", [384, 1024, 8, 6, 1024]),
    ("llama-40m", [416, 1024, 8, 8, 1024]),
    ("llama-60m", [512, 1376, 8, 8, 1024]),
    ("llama-71m", [512, 1368, 8, 12, 1024]),
    ("llama-100m", [640, 1708, 10, 12, 1024]),
    ("llama-130m", [768, 2048, 12, 12, 1024]),
    ("llama-250m", [768, 2560, 16, 24, 1024]),
    ("llama-350m", [1024, 2736, 16, 24, 1024]),
    ("llama-1b", [2048, 5461, 32, 24, 1024]),
    ("llama-3b", [2560, 6848, 32, 32, 1024]),
    ("llama-7b", [4096, 11008, 32, 32, 2048]),
];

/// Largest number of blocks.
pub(crate) const MOST_LAYERS: usize = 1 << 10;

impl LlamaConfig {
    /// The names that [`LlamaConfig::named`] knows, smallest model first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|(name, _)| *name)
    }

    /// A named shape from the pretraining papers, with untied embeddings and the given vocabulary (the papers use 32,000).
    ///
    /// The number in a name counts parameters at the papers' vocabulary.
    pub fn named(name: &str, vocab_size: usize) -> Result<Self, ModelError> {
        let (_, [hidden, intermediate, heads, layers, positions]) =
            *SHAPES.iter().find(|(known, _)| *known == name).ok_or_else(|| ModelError::UnknownShape {
                name: name.to_string(),
                known: Self::names().collect::<Vec<_>>().join(", "),
            })?;
        Ok(Self {
            family: Family::Llama,
            vocab_size,
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: hidden / heads,
            max_position_embeddings: positions,
            rope_theta: 10_000.0,
            rope_scaling: None,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            features: Features::default(),
            parameterization: Parameterization::default(),
        })
    }

    /// Rejects a configuration that no model can have, naming the fields.
    pub fn validate(&self) -> Result<(), ModelError> {
        let refuse = |reason: String| Err(ModelError::Config(reason));
        // The largest values keep every product of sizes within 64 bits, whatever values a file contains.
        for (field, value, most) in [
            ("vocab_size", self.vocab_size, 1 << 25),
            ("hidden_size", self.hidden_size, 1 << 17),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 13),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 26),
        ] {
            if value == 0 || value > most {
                return refuse(format!("{field} is {value}; it must be from 1 to {most}"));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse(format!("head_dim is {}; rotary positions need an even number", self.head_dim));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return refuse(format!(
                "num_attention_heads is {} and num_key_value_heads is {}; the first must be a multiple of the second",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        for (field, value) in [("rope_theta", self.rope_theta), ("rms_norm_eps", self.rms_norm_eps)] {
            if !(value.is_finite() && value > 0.0) {
                return refuse(format!("{field} is {value}; it must be greater than 0"));
            }
        }
        if !(self.initializer_range.is_finite() && self.initializer_range >= 0.0) {
            return refuse(format!("initializer_range is {}; it must be 0 or greater", self.initializer_range));
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate()?;
            if matches!(scaling, RopeScaling::Dynamic { .. }) && self.head_dim < 4 {
                return refuse(format!(
                    "rope_scaling.rope_type is dynamic and head_dim {}; only heads of 4 or more have a base that can grow",
                    self.head_dim
                ));
            }
        }
        self.features.validate()?;
        self.parameterization.validate()?;
        Ok(())
    }

    /// `hidden_size / num_attention_heads`, rejected if it leaves a remainder.
    pub fn default_head_dim(hidden_size: usize, heads: usize) -> Result<usize, ModelError> {
        if heads == 0 || !hidden_size.is_multiple_of(heads) {
            return Err(ModelError::Config(format!(
                "hidden_size {hidden_size} is not divisible by num_attention_heads {heads}; change one of them or set head_dim"
            )));
        }
        Ok(hidden_size / heads)
    }

    /// Number of trainable parameters.
    pub fn parameters(&self) -> usize {
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        tables * self.vocab_size * self.hidden_size
            + self.num_hidden_layers * (self.block_matrices() + self.block_vectors())
            + self.hidden_size
    }

    /// Number of elements of the norms and biases of one block.
    pub fn block_vectors(&self) -> usize {
        let [queries, keys] = [self.num_attention_heads, self.num_key_value_heads].map(|heads| heads * self.head_dim);
        let biases = [
            (self.features.qkv_bias, queries + 2 * keys),
            (self.features.output_bias, self.hidden_size),
            (self.features.mlp_bias, 2 * self.intermediate_size + self.hidden_size),
        ];
        let biases: usize = biases.into_iter().filter(|(has, _)| *has).map(|(_, values)| values).sum();
        let heads = match self.features.head_norms {
            None => 0,
            Some(HeadNorms::EachHead) => 2 * self.head_dim,
            Some(HeadNorms::AllHeads) => queries + keys,
        };
        2 * self.hidden_size + heads + biases
    }

    /// Number of positions of the longest sequence: more than the model was trained for where its rotary angles adapt to longer ones.
    pub fn longest_sequence(&self) -> usize {
        match self.rope_scaling {
            Some(RopeScaling::Dynamic { factor }) if factor > 1.0 => {
                (self.max_position_embeddings as f64 * factor) as usize
            }
            _ => self.max_position_embeddings,
        }
    }

    /// Number of trained parameters in place of the seven matrices of one block.
    pub fn block_matrices(&self) -> usize {
        self.block_shapes().map(|shape| self.parameterization.method().values(shape)).sum()
    }

    /// Positions of sparse parts in the whole model, which are stored but not trained.
    pub fn positions(&self) -> usize {
        let block: usize = self.block_shapes().map(|shape| self.parameterization.method().positions(shape)).sum();
        self.num_hidden_layers * block
    }

    /// Elements that the forward pass of a block keeps for the backward pass, per token, on the CPU backend: its input, the outputs of both
    /// norms (or, where they come after the parts, their inputs), queries, keys, values and the attention's output, the sum after it, and the three
    /// inner parts of the feed-forward part.
    pub fn kept(&self) -> usize {
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let whole = 4 * self.hidden_size + 2 * queries + 2 * keys + 3 * self.intermediate_size;
        // Scales of the norms, and the logarithm of the softmax sum of each head.
        let scales = 2 + self.num_attention_heads;
        // Norms of queries and keys keep their inputs and scales.
        let heads = match self.features.head_norms {
            None => 0,
            Some(HeadNorms::EachHead) => queries + keys + self.num_attention_heads + self.num_key_value_heads,
            Some(HeadNorms::AllHeads) => queries + keys + 2,
        };
        let linear: usize = self.block_shapes().map(|[d_in, _]| self.parameterization.method().kept(d_in)).sum();
        whole + scales + heads + linear
    }

    /// `[d_in, d_out]` of the seven linear layers of a block.
    pub fn block_shapes(&self) -> impl Iterator<Item = [usize; 2]> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let attention = [[hidden, queries], [hidden, keys], [hidden, keys], [queries, hidden]];
        attention.into_iter().chain([[hidden, inner], [hidden, inner], [inner, hidden]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_shapes_have_the_published_parameter_counts() {
        for (name, published) in [
            ("llama-9m", 8_995_968),
            ("llama-20m", 19_548_416),
            ("llama-35m", 35_197_824),
            ("llama-60m", 58_073_600),
            ("llama-71m", 70_578_688),
            ("llama-130m", 134_105_856),
            ("llama-350m", 367_969_280),
            ("llama-1b", 1_339_082_752),
            ("llama-7b", 6_738_415_616),
        ] {
            let config = LlamaConfig::named(name, 32_000).unwrap();
            assert_eq!(config.parameters(), published, "{name}");
        }
    }

    #[test]
    fn every_named_shape_is_valid() {
        for name in LlamaConfig::names() {
            LlamaConfig::named(name, 32_000).unwrap().validate().unwrap();
        }
    }

    #[test]
    fn refusals_name_the_field() {
        let good = LlamaConfig::named("llama-9m", 100).unwrap();
        let message = |config: LlamaConfig| config.validate().unwrap_err().to_string();
        assert!(message(LlamaConfig { vocab_size: 0, ..good.clone() }).contains("vocab_size"));
        assert!(message(LlamaConfig { head_dim: 3, ..good.clone() }).contains("head_dim"));
        assert!(message(LlamaConfig { num_key_value_heads: 3, ..good.clone() }).contains("num_key_value_heads"));
        assert!(message(LlamaConfig { rope_theta: f64::NAN, ..good.clone() }).contains("rope_theta"));
        assert!(LlamaConfig::default_head_dim(100, 3).unwrap_err().to_string().contains("100"));
        assert!(LlamaConfig::named("llama-8m", 100).unwrap_err().to_string().contains("llama-9m"));
    }
}
