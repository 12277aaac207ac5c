//! The encoder that vision transformers and both towers of CLIP share: pre-norm blocks of attention and a feed-forward part.
//!
//! The blocks of ViT and CLIP differ in the names of their layers alone.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};

use super::config::EncoderConfig;
use crate::error::ModelError;
use crate::linear::Dense;
use crate::ops::{self, Gelu};
use crate::weights::{Builder, Init, Layout};

/// Layer norm over the last dimension.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// Gain `[hidden_size]`.
    pub weight: Param<Tensor<1>>,
    /// Bias `[hidden_size]`.
    pub bias: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

impl LayerNorm {
    pub(super) fn build(builder: &mut Builder, path: &str, config: &EncoderConfig) -> Result<Self, ModelError> {
        Ok(Self {
            weight: builder.vector(&format!("{path}.weight"), config.hidden_size, Init::Constant(1.0))?,
            bias: builder.vector(&format!("{path}.bias"), config.hidden_size, Init::Constant(0.0))?,
            eps: config.layer_norm_eps,
        })
    }

    /// `x [.., hidden_size]`, any number of leading dimensions.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        ops::layer_norm(x, self.weight.val(), self.bias.val(), self.eps)
    }
}

/// Feed-forward part.
#[derive(Module, Debug)]
pub struct EncoderMlp {
    /// Inner layer.
    pub fc1: Dense,
    /// Output.
    pub fc2: Dense,
}

/// A dense layer, with a bias if it has one.
pub(super) fn dense(
    builder: &mut Builder,
    path: &str,
    [d_in, d_out]: [usize; 2],
    bias: bool,
) -> Result<Dense, ModelError> {
    let weight = builder.matrix(&format!("{path}.weight"), [d_in, d_out], Layout::Transposed, Init::Standard)?;
    let bias = match bias {
        true => Some(builder.vector(&format!("{path}.bias"), d_out, Init::Constant(0.0))?),
        false => None,
    };
    Ok(Dense { weight, bias })
}

impl EncoderMlp {
    fn build(builder: &mut Builder, path: &str, config: &EncoderConfig) -> Result<Self, ModelError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            fc1: dense(builder, &format!("{path}.fc1"), [hidden, inner], true)?,
            fc2: dense(builder, &format!("{path}.fc2"), [inner, hidden], true)?,
        })
    }
}

/// Constants of a block.
#[derive(Clone, Copy, Debug)]
struct Constants {
    heads: usize,
    act: Gelu,
}

/// Positions that each position attends to.
#[derive(Clone, Debug)]
pub struct Sight {
    causal: bool,
    starts: Option<Tensor<2, Int>>,
}

impl Sight {
    /// All positions.
    pub fn all() -> Self {
        Self { causal: false, starts: None }
    }

    /// The position itself and earlier ones, from the given first one on `[batch, positions]`.
    pub fn earlier(starts: Option<Tensor<2, Int>>) -> Self {
        Self { causal: true, starts }
    }
}

/// Layers of a block by their purpose.
struct Layers<'a> {
    before: &'a LayerNorm,
    queries: &'a Dense,
    keys: &'a Dense,
    values: &'a Dense,
    output: &'a Dense,
    after: &'a LayerNorm,
    mlp: &'a EncoderMlp,
}

impl Layers<'_> {
    /// `x [batch, positions, hidden_size]` to the same shape.
    fn forward(&self, x: Tensor<3>, constants: Constants, sight: &Sight) -> Tensor<3> {
        let shape @ [batch, positions, hidden] = x.dims();
        let rows = [batch * positions, hidden];
        let normed = self.before.forward(x.clone()).reshape(rows);
        let split = |layer: &Dense| {
            layer.forward(normed.clone()).reshape([batch, positions, constants.heads, hidden / constants.heads])
        };
        let (q, k, v) = (split(self.queries), split(self.keys), split(self.values));
        let heads = match sight.causal {
            false => ops::attention(q, k, v),
            true => ops::causal_attention(q, k, v, sight.starts.clone()),
        };
        let x = x + self.output.forward(heads.reshape(rows)).reshape(shape);
        let inner = self.mlp.fc1.forward(self.after.forward(x.clone()).reshape(rows));
        x + self.mlp.fc2.forward(ops::gelu(inner, constants.act)).reshape(shape)
    }
}

macro_rules! block {
    (
        $(#[$doc:meta])* $Block:ident, $attention:ident:
        $(#[$attention_doc:meta])* $Attention:ident with $output:ident, $before:ident, $after:ident
    ) => {
        $(#[$doc])*
        #[derive(Module, Debug)]
        pub struct $Block {
            /// Attention.
            pub $attention: $Attention,
            /// Norm before the attention.
            pub $before: LayerNorm,
            /// Feed-forward part.
            pub mlp: EncoderMlp,
            /// Norm before the feed-forward part.
            pub $after: LayerNorm,
            #[module(skip)]
            constants: Constants,
        }

        $(#[$attention_doc])*
        #[derive(Module, Debug)]
        pub struct $Attention {
            /// Queries.
            pub q_proj: Dense,
            /// Keys.
            pub k_proj: Dense,
            /// Values.
            pub v_proj: Dense,
            /// Output.
            pub $output: Dense,
        }

        impl $Block {
            pub(super) fn build(
                builder: &mut Builder,
                path: &str,
                config: &EncoderConfig,
                qkv_bias: bool,
            ) -> Result<Self, ModelError> {
                let square = [config.hidden_size; 2];
                let attention = format!("{path}.{}", stringify!($attention));
                let mut linear = |name: &str, bias| dense(builder, &format!("{attention}.{name}"), square, bias);
                Ok(Self {
                    $attention: $Attention {
                        q_proj: linear("q_proj", qkv_bias)?,
                        k_proj: linear("k_proj", qkv_bias)?,
                        v_proj: linear("v_proj", qkv_bias)?,
                        $output: linear(stringify!($output), true)?,
                    },
                    $before: LayerNorm::build(builder, &format!("{path}.{}", stringify!($before)), config)?,
                    mlp: EncoderMlp::build(builder, &format!("{path}.mlp"), config)?,
                    $after: LayerNorm::build(builder, &format!("{path}.{}", stringify!($after)), config)?,
                    constants: Constants { heads: config.num_attention_heads, act: config.hidden_act },
                })
            }

            /// `x [batch, positions, hidden_size]` to the same shape.
            pub fn forward(&self, x: Tensor<3>, sight: &Sight) -> Tensor<3> {
                let attention = &self.$attention;
                let layers = Layers {
                    before: &self.$before,
                    queries: &attention.q_proj,
                    keys: &attention.k_proj,
                    values: &attention.v_proj,
                    output: &attention.$output,
                    after: &self.$after,
                    mlp: &self.mlp,
                };
                layers.forward(x, self.constants, sight)
            }
        }
    };
}

block!(
    /// A block of a vision transformer.
    VitBlock, attention:
    /// Attention of a vision transformer.
    VitAttention with o_proj, layernorm_before, layernorm_after
);
block!(
    /// A block of CLIP.
    ClipBlock, self_attn:
    /// Attention of CLIP.
    ClipAttention with out_proj, layer_norm1, layer_norm2
);
