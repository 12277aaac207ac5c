//! One decoder block: attention and SwiGLU feed-forward, each behind a norm and around a residual connection.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use super::cache::KvCache;
use super::config::LlamaConfig;
use super::norm::RmsNorm;
use crate::error::ModelError;
use crate::linear::Linear;
use crate::ops::{self, Rotary};
use crate::weights::Builder;

/// Tensors that all blocks of one forward pass share.
#[derive(Clone, Debug)]
pub struct BlockContext {
    /// Rotary angles of the positions.
    pub rotary: Rotary,
    /// First position of each position's document `[batch, positions]`; none when every row is one document.
    pub starts: Option<Tensor<2, Int>>,
}

/// A decoder block.
#[derive(Module, Debug)]
pub struct DecoderBlock {
    /// Attention.
    pub self_attn: Attention,
    /// Feed-forward part.
    pub mlp: Mlp,
    /// Norm before the attention.
    pub input_layernorm: RmsNorm,
    /// Norm before the feed-forward part.
    pub post_attention_layernorm: RmsNorm,
}

impl DecoderBlock {
    pub(crate) fn build(builder: &mut Builder, path: &str, config: &LlamaConfig) -> Result<Self, ModelError> {
        Ok(Self {
            self_attn: Attention::build(builder, &format!("{path}.self_attn"), config)?,
            mlp: Mlp::build(builder, &format!("{path}.mlp"), config)?,
            input_layernorm: RmsNorm::build(builder, &format!("{path}.input_layernorm"), config)?,
            post_attention_layernorm: RmsNorm::build(builder, &format!("{path}.post_attention_layernorm"), config)?,
        })
    }

    /// The seven linear layers by their names.
    pub fn linears(&self) -> [(&'static str, &Linear); 7] {
        [
            ("self_attn.q_proj", &self.self_attn.q_proj),
            ("self_attn.k_proj", &self.self_attn.k_proj),
            ("self_attn.v_proj", &self.self_attn.v_proj),
            ("self_attn.o_proj", &self.self_attn.o_proj),
            ("mlp.gate_proj", &self.mlp.gate_proj),
            ("mlp.up_proj", &self.mlp.up_proj),
            ("mlp.down_proj", &self.mlp.down_proj),
        ]
    }

    /// Mutable variant of [`DecoderBlock::linears`].
    pub fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        [
            ("self_attn.q_proj", &mut self.self_attn.q_proj),
            ("self_attn.k_proj", &mut self.self_attn.k_proj),
            ("self_attn.v_proj", &mut self.self_attn.v_proj),
            ("self_attn.o_proj", &mut self.self_attn.o_proj),
            ("mlp.gate_proj", &mut self.mlp.gate_proj),
            ("mlp.up_proj", &mut self.mlp.up_proj),
            ("mlp.down_proj", &mut self.mlp.down_proj),
        ]
    }

    /// `x [batch, positions, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<3>, context: &BlockContext) -> Tensor<3> {
        self.around(x, |attention, normed| {
            let [q, k, v] = attention.project(normed, &context.rotary, 0);
            ops::causal_attention(q, k, v, context.starts.clone())
        })
    }

    /// As [`DecoderBlock::forward`], for positions that follow those in the cache.
    pub fn forward_cached(&self, x: Tensor<3>, rotary: &Rotary, cache: &mut KvCache, layer: usize) -> Tensor<3> {
        self.around(x, |attention, normed| {
            let [q, k, v] = attention.project(normed, rotary, cache.len());
            let (k, v) = cache.append(layer, k, v);
            ops::causal_attention(q, k, v, None)
        })
    }

    fn around(&self, x: Tensor<3>, attend: impl FnOnce(&Attention, Tensor<3>) -> Tensor<4>) -> Tensor<3> {
        let heads = attend(&self.self_attn, self.input_layernorm.forward(x.clone()));
        let x = x + self.self_attn.merge(heads);
        let feed = self.mlp.forward(self.post_attention_layernorm.forward(x.clone()));
        x + feed
    }
}

/// Causal self-attention with rotary positions and grouped queries.
#[derive(Module, Debug)]
pub struct Attention {
    /// Queries.
    pub q_proj: Linear,
    /// Keys.
    pub k_proj: Linear,
    /// Values.
    pub v_proj: Linear,
    /// Output.
    pub o_proj: Linear,
    #[module(skip)]
    head_dim: usize,
}

impl Attention {
    fn build(builder: &mut Builder, path: &str, config: &LlamaConfig) -> Result<Self, ModelError> {
        let hidden = config.hidden_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let mut linear = |name: &str, d_in, d_out| {
            Linear::build(builder, &format!("{path}.{name}"), [d_in, d_out], &config.parameterization)
        };
        Ok(Self {
            q_proj: linear("q_proj", hidden, queries)?,
            k_proj: linear("k_proj", hidden, keys)?,
            v_proj: linear("v_proj", hidden, keys)?,
            o_proj: linear("o_proj", queries, hidden)?,
            head_dim: config.head_dim,
        })
    }

    /// Rotated queries and keys, and values, each `[batch, positions, heads, head_dim]`; the first position has index `offset`.
    fn project(&self, x: Tensor<3>, rotary: &Rotary, offset: usize) -> [Tensor<4>; 3] {
        let [batch, positions, hidden] = x.dims();
        let rows = x.reshape([batch * positions, hidden]);
        let split = |y: Tensor<2>| {
            let heads = y.dims()[1] / self.head_dim;
            y.reshape([batch, positions, heads, self.head_dim])
        };
        [
            ops::rotary(split(self.q_proj.forward(rows.clone())), rotary, offset),
            ops::rotary(split(self.k_proj.forward(rows.clone())), rotary, offset),
            split(self.v_proj.forward(rows)),
        ]
    }

    /// `[batch, positions, heads, head_dim]` to `[batch, positions, hidden_size]`.
    fn merge(&self, heads: Tensor<4>) -> Tensor<3> {
        let [batch, positions, count, dim] = heads.dims();
        let out = self.o_proj.forward(heads.reshape([batch * positions, count * dim]));
        let hidden = out.dims()[1];
        out.reshape([batch, positions, hidden])
    }
}

/// SwiGLU feed-forward part ("GLU Variants Improve Transformer", arXiv 2002.05202).
#[derive(Module, Debug)]
pub struct Mlp {
    /// Gate.
    pub gate_proj: Linear,
    /// Values that the gate multiplies.
    pub up_proj: Linear,
    /// Output.
    pub down_proj: Linear,
    #[module(skip)]
    keep_gate: bool,
}

impl Mlp {
    fn build(builder: &mut Builder, path: &str, config: &LlamaConfig) -> Result<Self, ModelError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let mut linear = |name: &str, d_in, d_out| {
            Linear::build(builder, &format!("{path}.{name}"), [d_in, d_out], &config.parameterization)
        };
        Ok(Self {
            gate_proj: linear("gate_proj", hidden, inner)?,
            up_proj: linear("up_proj", hidden, inner)?,
            down_proj: linear("down_proj", inner, hidden)?,
            keep_gate: config.parameterization.method().keeps_gate(),
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, positions, hidden] = x.dims();
        let rows = x.reshape([batch * positions, hidden]);
        let (gate, up) = (self.gate_proj.forward(rows.clone()), self.up_proj.forward(rows));
        let inner = if self.keep_gate { ops::swiglu(gate, up) } else { gate * up };
        self.down_proj.forward(inner).reshape([batch, positions, hidden])
    }
}
