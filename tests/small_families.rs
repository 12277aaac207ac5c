//! A small model of every family.

use burn::tensor::Device;
use lowrank_models::{
    Choose, Family, Features, Init, Layout, Llama, LlamaConfig, ModelError, RandomWeights, WeightSource,
};

/// Random weights in which no vector is constant, so that each of them matters.
struct Uneven(RandomWeights);

impl WeightSource for Uneven {
    fn matrix(&mut self, path: &str, shape: [usize; 2], layout: Layout, init: Init) -> Result<Vec<f32>, ModelError> {
        self.0.matrix(path, shape, layout, init)
    }

    fn vector(&mut self, path: &str, len: usize, init: Init) -> Result<Vec<f32>, ModelError> {
        let noise = self.0.matrix(path, [1, len], Layout::AsStored, Init::Normal(0.3))?;
        Ok(self.0.vector(path, len, init)?.iter().zip(noise).map(|(value, noise)| value + noise).collect())
    }

    fn positions(&mut self, path: &str, n: usize, below: usize, at: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        self.0.positions(path, n, below, at)
    }
}

/// A small model of a family with all that its files can say.
pub fn config(family: Family) -> LlamaConfig {
    let own = family.features();
    let features = match family {
        Family::Llama => Features { qkv_bias: true, output_bias: true, mlp_bias: true, ..own },
        Family::Mistral => Features { sliding_window: Some(3), ..own },
        Family::Qwen2 => Features { sliding_window: Some(4), full_layers: vec![0], ..own },
        Family::Qwen3 => Features { qkv_bias: true, output_bias: true, ..own },
        Family::SmolLm3 => Features { unrotated_layers: vec![1], mlp_bias: true, ..own },
        Family::Olmo2 => own,
        Family::Granite => Features {
            embedding_multiplier: Some(6.0),
            residual_multiplier: Some(0.5),
            attention_multiplier: Some(0.7),
            logits_scaling: Some(2.0),
            ..own
        },
    };
    LlamaConfig {
        family,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        max_position_embeddings: 40,
        initializer_range: 0.3,
        features,
        ..LlamaConfig::named("llama-9m", 50).expect("a known shape")
    }
}

/// A model with weights that depend on nothing but its shape.
pub fn model(config: &LlamaConfig, device: &Device) -> Llama {
    let source = RandomWeights { seed: 3, std: config.initializer_range };
    Llama::build(config, &mut Uneven(source), device).expect("a model")
}
