//! Two factors with a non-linearity between them ("CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", arXiv 2502.10940).

use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layer::{LinearLayer, plus_bias};
use super::parameterization::{LinearMethod, ParameterizationSpec};
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout};

/// Options of CoLA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ColaOptions {
    /// Width between the factors. A run that is given none takes a quarter of the
    /// model's width.
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// Keep the non-linearity of the feed-forward part's gate, as the small models of the paper do.
    pub keep_gate: bool,
}

impl Default for ColaOptions {
    fn default() -> Self {
        Self { rank: 128, keep_gate: true }
    }
}

impl LinearMethod for ColaOptions {
    type Layer = Cola;

    fn spec() -> &'static ParameterizationSpec {
        const SPEC: &ParameterizationSpec = &ParameterizationSpec {
            exports: Err("it has a non-linearity between its factors"),
            ..ParameterizationSpec::plain(Entry {
                options: || OptionList::of(&ColaOptions::default()),
                papers: &[Paper {
                    title: "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation",
                    place: "2502.10940",
                }],
                memory: "r (d_in + d_out)",
                ..Entry::plain(Kind::Parameterization, "cola", "two factors with a non-linearity in between")
            })
        };
        SPEC
    }

    fn values(&self, [d_in, d_out]: [usize; 2]) -> usize {
        self.rank * (d_in + d_out)
    }

    fn kept(&self, _d_in: usize) -> usize {
        3 * self.rank
    }

    fn keeps_gate(&self) -> bool {
        self.keep_gate
    }

    fn build(&self, builder: &mut Builder, path: &str, [d_in, d_out]: [usize; 2]) -> Result<Cola, ModelError> {
        let rank = self.rank;
        // Entries of the product then have variance 1 / (d_in + d_out).
        let init = Init::Normal((rank as f64).powf(-0.25) * ((d_in + d_out) as f64).powf(-0.25));
        Ok(Cola {
            a: builder.matrix(&format!("{path}.a"), [d_in, rank], Layout::Transposed, init)?,
            b: builder.matrix(&format!("{path}.b"), [rank, d_out], Layout::Transposed, init)?,
            bias: None,
        })
    }
}

/// `y = silu(x A) B`. No dense weight gives the same outputs.
#[derive(Module, Debug)]
pub struct Cola {
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
    /// Bias `[d_out]`; none in families without.
    pub bias: Option<Param<Tensor<1>>>,
}

impl LinearLayer for Cola {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let inner = activation::silu(ops::linear(x, self.a.val()));
        plus_bias(ops::linear(inner, self.b.val()), &self.bias)
    }

    fn to_dense(&self) -> Option<Tensor<2>> {
        None
    }

    fn bias_mut(&mut self) -> &mut Option<Param<Tensor<1>>> {
        &mut self.bias
    }
}
