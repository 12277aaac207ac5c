//! Low rank with a non-linearity, and whole input channels ("LOST: Low-rank and Sparse Pre-training for Large Language Models", arXiv
//! 2508.02668). Written from the abstract and the public reviews; the authors' code could not be read.

use std::cell::OnceCell;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Int, Tensor, activation};
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layer::{LinearLayer, plus_bias};
use super::low_rank::{once, spectral_factors};
use super::parameterization::{LinearMethod, ParameterizationSpec, rank_fits};
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout, RandomWeights, WeightSource};

/// Options of LOST.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LostOptions {
    /// Width between the factors, at most the smaller side of a layer. A run that is given none takes a quarter of the
    /// model's width.
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// Share of input channels in the sparse part.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub density: f64,
    /// Weight of the factors against the channels.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub gamma: f64,
}

impl Default for LostOptions {
    fn default() -> Self {
        Self { rank: 128, density: 0.03, gamma: 0.7 }
    }
}

impl LostOptions {
    /// Channels of the sparse part; at least one.
    fn channels(&self, d_in: usize) -> usize {
        ((self.density * d_in as f64).round() as usize).max(1)
    }
}

impl LinearMethod for LostOptions {
    type Layer = Lost;

    fn spec() -> &'static ParameterizationSpec {
        const SPEC: &ParameterizationSpec = &ParameterizationSpec {
            exports: Err("it has a non-linearity between its factors"),
            ..ParameterizationSpec::plain(Entry {
                options: || OptionList::of(&LostOptions::default()),
                papers: &[Paper {
                    title: "LOST: Low-rank and Sparse Pre-training for Large Language Models",
                    place: "2508.02668",
                }],
                memory: "r (d_in + d_out) + k d_out, and k channels; k = density d_in",
                ..Entry::plain(
                    Kind::Parameterization,
                    "lost",
                    "two factors with a non-linearity, and whole input channels",
                )
            })
        };
        SPEC
    }

    fn check_shape(&self, shape: [usize; 2]) -> Result<(), String> {
        rank_fits(self.rank, shape)
    }

    fn values(&self, [d_in, d_out]: [usize; 2]) -> usize {
        self.rank * (d_in + d_out) + self.channels(d_in) * d_out
    }

    fn positions(&self, [d_in, _]: [usize; 2]) -> usize {
        self.channels(d_in)
    }

    fn kept(&self, d_in: usize) -> usize {
        3 * self.rank + self.channels(d_in)
    }

    fn build(&self, builder: &mut Builder, path: &str, shape @ [d_in, d_out]: [usize; 2]) -> Result<Lost, ModelError> {
        let (rank, count) = (self.rank, self.channels(d_in));
        let made = OnceCell::new();
        let start = |random: &mut RandomWeights| -> Result<&(LostStart, Vec<f32>), ModelError> {
            once(&made, || {
                let dense = random.matrix(&format!("{path}.weight"), shape, Layout::Transposed, Init::Standard)?;
                let (a, b) = spectral_factors(random, path, shape, rank)?;
                let start = Lost::start(&dense, a, b, shape, count);
                let row = |channel: &i32| dense[*channel as usize * d_out..][..d_out].to_vec();
                let rows = start.channels.iter().flat_map(row).collect();
                Ok((start, rows))
            })
        };
        let first = |random: &mut RandomWeights| Ok(start(random)?.0.a.clone());
        let second = |random: &mut RandomWeights| Ok(start(random)?.0.b.clone());
        let chosen = |random: &mut RandomWeights| Ok(start(random)?.0.channels.clone());
        let rows = |random: &mut RandomWeights| Ok(start(random)?.1.clone());
        let name = |part: &str| format!("{path}.{part}");
        Ok(Lost {
            a: builder.matrix(&name("a"), [d_in, rank], Layout::Transposed, Init::Computed(&first))?,
            b: builder.matrix(&name("b"), [rank, d_out], Layout::Transposed, Init::Computed(&second))?,
            sparse: builder.matrix(&name("sparse"), [count, d_out], Layout::Transposed, Init::Computed(&rows))?,
            channels: builder.positions(&name("channels"), count, d_in, Some(&chosen))?,
            bias: None,
            gamma: self.gamma,
        })
    }
}

/// `y = gamma silu(x A) B + (1 - gamma) x[:, channels] S`. No dense weight gives the same outputs.
#[derive(Module, Debug)]
pub struct Lost {
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
    /// Weights of the channels `[channels, d_out]`.
    pub sparse: Param<Tensor<2>>,
    /// The channels, ascending: those with the largest residual at the start.
    pub channels: Param<Tensor<1, Int>>,
    /// Bias `[d_out]`; none in families without.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    gamma: f64,
}

/// Start of a layer of LOST.
pub struct LostStart {
    /// First factor `[d_in, rank]`, row by row.
    pub a: Vec<f32>,
    /// Second factor `[rank, d_out]`, row by row.
    pub b: Vec<f32>,
    /// Norm of the residual of each input channel.
    pub norms: Vec<f32>,
    /// The channels with the largest norms, ascending.
    pub channels: Vec<i32>,
}

impl Lost {
    /// A layer of given parts.
    pub fn from_parts(a: Tensor<2>, b: Tensor<2>, sparse: Tensor<2>, channels: Tensor<1, Int>, gamma: f64) -> Self {
        Self {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            sparse: Param::from_tensor(sparse),
            channels: Param::initialized(ParamId::new(), channels),
            bias: None,
            gamma,
        }
    }

    /// Computes factors and channels from a dense weight `[d_in, d_out]`, given its leading factors.
    pub fn start(dense: &[f32], a: Vec<f32>, b: Vec<f32>, [d_in, d_out]: [usize; 2], count: usize) -> LostStart {
        let rank = a.len() / d_in;
        let norm = |channel: usize| {
            let inside = |output: usize| {
                (0..rank).map(|k| f64::from(a[channel * rank + k]) * f64::from(b[k * d_out + output])).sum::<f64>()
            };
            let square = |output: usize| (f64::from(dense[channel * d_out + output]) - inside(output)).powi(2);
            (0..d_out).map(square).sum::<f64>().sqrt() as f32
        };
        let norms: Vec<f32> = (0..d_in).map(norm).collect();
        let mut order: Vec<i32> = (0..d_in as i32).collect();
        order.sort_by(|x, y| norms[*y as usize].total_cmp(&norms[*x as usize]).then(x.cmp(y)));
        order.truncate(count);
        order.sort_unstable();
        LostStart { a, b, norms, channels: order }
    }
}

impl LinearLayer for Lost {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let inner = ops::linear(activation::silu(ops::linear(x.clone(), self.a.val())), self.b.val());
        let channels = ops::linear(x.select(1, self.channels.val()), self.sparse.val());
        plus_bias(inner.mul_scalar(self.gamma) + channels.mul_scalar(1.0 - self.gamma), &self.bias)
    }

    fn to_dense(&self) -> Option<Tensor<2>> {
        None
    }

    fn bias_mut(&mut self) -> &mut Option<Param<Tensor<1>>> {
        &mut self.bias
    }
}
