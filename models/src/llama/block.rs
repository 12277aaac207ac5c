//! One decoder block: attention and SwiGLU feed-forward, each with a norm and inside a residual connection.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};

use super::cache::KvCache;
use super::config::LlamaConfig;
use super::family::HeadNorms;
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
    /// First position that each position sees in a block with a window `[batch, positions]`; none when it sees all of its document.
    pub window_starts: Option<Tensor<2, Int>>,
}

impl BlockContext {
    /// The context of `positions` positions in rows of documents that begin at `starts`, for blocks with this window or none.
    pub(super) fn new(
        rotary: Rotary,
        starts: Option<Tensor<2, Int>>,
        window: Option<usize>,
        [batch, positions]: [usize; 2],
        device: &Device,
    ) -> Self {
        let window_starts = match window.and_then(|window| window_starts(window, [batch, positions], positions, device))
        {
            None => starts.clone(),
            Some(first) => Some(match &starts {
                None => first,
                Some(starts) => first.clone().mask_where(starts.clone().greater(first), starts.clone()),
            }),
        };
        Self { rotary, starts, window_starts }
    }
}

/// First of `keys` positions that each of the last `positions` ones sees within a window `[batch, positions]`; none if all see everything.
fn window_starts(
    window: usize,
    [batch, positions]: [usize; 2],
    keys: usize,
    device: &Device,
) -> Option<Tensor<2, Int>> {
    if keys <= window {
        return None;
    }
    let first = (keys - positions) as i64 + 1 - window as i64;
    let device = device.clone().inner();
    let starts = Tensor::<1, Int>::arange(first..first + positions as i64, &device).clamp_min(0);
    Some(starts.reshape([1, positions]).expand([batch, positions]))
}

/// A decoder block.
#[derive(Module, Debug)]
pub struct DecoderBlock {
    /// Attention.
    pub self_attn: Attention,
    /// Feed-forward part.
    pub mlp: Mlp,
    /// Norm before the attention; none in families with norms after the parts.
    pub input_layernorm: Option<RmsNorm>,
    /// Norm before the feed-forward part; in families with norms after the parts, the norm after the attention.
    pub post_attention_layernorm: RmsNorm,
    /// Norm after the feed-forward part; none in families with norms before the parts.
    pub post_feedforward_layernorm: Option<RmsNorm>,
    #[module(skip)]
    residual_multiplier: Option<f64>,
}

impl DecoderBlock {
    pub(crate) fn build(builder: &mut Builder, layer: usize, config: &LlamaConfig) -> Result<Self, ModelError> {
        let path = format!("model.layers.{layer}");
        let after = config.features.norms_after;
        let attention = Attention::build(builder, &format!("{path}.self_attn"), layer, config)?;
        let mlp = Mlp::build(builder, &format!("{path}.mlp"), config)?;
        let mut norm = |name: &str| RmsNorm::build(builder, &format!("{path}.{name}"), config.hidden_size, config);
        Ok(Self {
            self_attn: attention,
            mlp,
            input_layernorm: if after { None } else { Some(norm("input_layernorm")?) },
            post_attention_layernorm: norm("post_attention_layernorm")?,
            post_feedforward_layernorm: if after { Some(norm("post_feedforward_layernorm")?) } else { None },
            residual_multiplier: config.features.residual_multiplier,
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
            let starts = if attention.window.is_some() { &context.window_starts } else { &context.starts };
            ops::scaled_causal_attention(q, k, v, starts.clone(), attention.scale)
        })
    }

    /// As [`DecoderBlock::forward`], for positions that follow those in the cache.
    pub fn forward_cached(&self, x: Tensor<3>, rotary: &Rotary, cache: &mut KvCache, layer: usize) -> Tensor<3> {
        self.around(x, |attention, normed| {
            let [q, k, v] = attention.project(normed, rotary, cache.len());
            let (k, v) = cache.append(layer, k, v, attention.window);
            let ([batch, positions, ..], keys) = (q.dims(), k.dims()[1]);
            let starts =
                attention.window.and_then(|window| window_starts(window, [batch, positions], keys, &q.device()));
            ops::scaled_causal_attention(q, k, v, starts, attention.scale)
        })
    }

    fn around(&self, x: Tensor<3>, attend: impl FnOnce(&Attention, Tensor<3>) -> Tensor<4>) -> Tensor<3> {
        let normed = match &self.input_layernorm {
            Some(norm) => norm.forward(x.clone()),
            None => x.clone(),
        };
        let attended = self.self_attn.merge(attend(&self.self_attn, normed));
        match &self.post_feedforward_layernorm {
            None => {
                let x = self.plus(x, attended);
                let feed = self.mlp.forward(self.post_attention_layernorm.forward(x.clone()));
                self.plus(x, feed)
            }
            Some(after) => {
                let x = self.plus(x, self.post_attention_layernorm.forward(attended));
                let feed = after.forward(self.mlp.forward(x.clone()));
                self.plus(x, feed)
            }
        }
    }

    /// The residual stream after a part.
    fn plus(&self, x: Tensor<3>, part: Tensor<3>) -> Tensor<3> {
        match self.residual_multiplier {
            None => x + part,
            Some(multiplier) => x + part.mul_scalar(multiplier),
        }
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
    /// Norm of the queries, in families that have one.
    pub q_norm: Option<RmsNorm>,
    /// Norm of the keys, in families that have one.
    pub k_norm: Option<RmsNorm>,
    #[module(skip)]
    head_dim: usize,
    #[module(skip)]
    head_norms: Option<HeadNorms>,
    #[module(skip)]
    rotates: bool,
    #[module(skip)]
    window: Option<usize>,
    #[module(skip)]
    scale: Option<f64>,
}

impl Attention {
    fn build(builder: &mut Builder, path: &str, layer: usize, config: &LlamaConfig) -> Result<Self, ModelError> {
        let (hidden, features) = (config.hidden_size, &config.features);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let mut linear = |name: &str, shape, has_bias| {
            Linear::build(builder, &format!("{path}.{name}"), shape, has_bias, &config.parameterization)
        };
        let [q_proj, k_proj, v_proj, o_proj] = [
            linear("q_proj", [hidden, queries], features.qkv_bias)?,
            linear("k_proj", [hidden, keys], features.qkv_bias)?,
            linear("v_proj", [hidden, keys], features.qkv_bias)?,
            linear("o_proj", [queries, hidden], features.output_bias)?,
        ];
        let mut norm = |name: &str, whole: usize| {
            let width = match features.head_norms {
                None => return Ok(None),
                Some(HeadNorms::EachHead) => config.head_dim,
                Some(HeadNorms::AllHeads) => whole,
            };
            RmsNorm::build(builder, &format!("{path}.{name}"), width, config).map(Some)
        };
        Ok(Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            q_norm: norm("q_norm", queries)?,
            k_norm: norm("k_norm", keys)?,
            head_dim: config.head_dim,
            head_norms: features.head_norms,
            rotates: features.rotates(layer),
            window: features.window(layer),
            scale: features.attention_multiplier,
        })
    }

    /// Queries and keys, normed and rotated where the layer does that, and values, each `[batch, positions, heads, head_dim]`; the first
    /// position has index `offset`.
    fn project(&self, x: Tensor<3>, rotary: &Rotary, offset: usize) -> [Tensor<4>; 3] {
        let [batch, positions, hidden] = x.dims();
        let rows = x.reshape([batch * positions, hidden]);
        let split = |y: Tensor<2>| {
            let heads = y.dims()[1] / self.head_dim;
            y.reshape([batch, positions, heads, self.head_dim])
        };
        let normed = |y: Tensor<2>, norm: &Option<RmsNorm>| match (norm, self.head_norms) {
            (Some(norm), Some(HeadNorms::AllHeads)) => split(norm.forward(y)),
            (Some(norm), _) => norm.forward(split(y)),
            (None, _) => split(y),
        };
        let rotated = |y: Tensor<4>| if self.rotates { ops::rotary(y, rotary, offset) } else { y };
        [
            rotated(normed(self.q_proj.forward(rows.clone()), &self.q_norm)),
            rotated(normed(self.k_proj.forward(rows.clone()), &self.k_norm)),
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
        let has_bias = config.features.mlp_bias;
        let mut linear = |name: &str, shape| {
            Linear::build(builder, &format!("{path}.{name}"), shape, has_bias, &config.parameterization)
        };
        Ok(Self {
            gate_proj: linear("gate_proj", [hidden, inner])?,
            up_proj: linear("up_proj", [hidden, inner])?,
            down_proj: linear("down_proj", [inner, hidden])?,
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
