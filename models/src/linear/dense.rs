//! One dense weight, and the adapters attached to it.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layer::LinearLayer;
use super::parameterization::{LinearMethod, ParameterizationSpec};
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout};
use lowrank_adapters::AdapterStack;

/// Dense layers have no options.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DenseOptions {}

impl LinearMethod for DenseOptions {
    type Layer = Dense;

    fn spec() -> &'static ParameterizationSpec {
        const SPEC: &ParameterizationSpec = &ParameterizationSpec::plain(Entry {
            options: || OptionList::of(&DenseOptions::default()),
            papers: &[Paper { title: "LLaMA: Open and Efficient Foundation Language Models", place: "2302.13971" }],
            memory: "d_in d_out",
            ..Entry::plain(Kind::Parameterization, "dense", "one dense weight")
        });
        SPEC
    }

    fn values(&self, [d_in, d_out]: [usize; 2]) -> usize {
        d_in * d_out
    }

    fn kept(&self, _d_in: usize) -> usize {
        0
    }

    fn build(&self, builder: &mut Builder, path: &str, [d_in, d_out]: [usize; 2]) -> Result<Dense, ModelError> {
        Dense::build(builder, path, d_in, d_out)
    }
}

/// `y = x W`, or `y = x W + b`.
#[derive(Module, Debug)]
pub struct Dense {
    /// Weight `[d_in, d_out]`.
    pub weight: Param<Tensor<2>>,
    /// Bias `[d_out]`; none in families without.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Dense {
    pub(crate) fn build(builder: &mut Builder, path: &str, d_in: usize, d_out: usize) -> Result<Self, ModelError> {
        let weight = builder.matrix(&format!("{path}.weight"), [d_in, d_out], Layout::Transposed, Init::Standard)?;
        Ok(Self { weight, bias: None })
    }

    /// A layer of given parts: weight `[d_in, d_out]`, bias `[d_out]`.
    pub fn from_parts(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self { weight: Param::from_tensor(weight), bias: bias.map(Param::from_tensor) }
    }

    /// `x [rows, d_in]` to `[rows, d_out]`. Adapters run factored.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        AdapterStack::linear(&self.weight, self.bias.as_ref().map(Param::val), x)
    }
}

impl LinearLayer for Dense {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        Self::forward(self, x)
    }

    fn to_dense(&self) -> Option<Tensor<2>> {
        Some(ops::widened(self.weight.val().inner()))
    }

    fn bias_mut(&mut self) -> &mut Option<Param<Tensor<1>>> {
        &mut self.bias
    }
}
