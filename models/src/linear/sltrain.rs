//! Sparse plus low rank ("SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", arXiv 2406.02214).

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Int, Tensor};
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layer::{LinearLayer, plus_bias};
use super::parameterization::{LinearMethod, ParameterizationSpec, rank_fits};
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout};

/// Options of SLTrain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SlTrainOptions {
    /// Width between the factors, at most the smaller side of a layer. A run that is given none takes a quarter of the
    /// model's width.
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// The product of the factors is scaled by alpha / rank.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub alpha: f64,
    /// Share of positions in the sparse part.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub density: f64,
    /// Train a scale tanh(q) instead of alpha / rank.
    pub trained_scale: bool,
}

impl Default for SlTrainOptions {
    fn default() -> Self {
        Self { rank: 128, alpha: 32.0, density: 0.03, trained_scale: false }
    }
}

impl LinearMethod for SlTrainOptions {
    type Layer = SlTrain;

    fn spec() -> &'static ParameterizationSpec {
        const SPEC: &ParameterizationSpec = &ParameterizationSpec {
            // A quarter of the width, as in the paper.
            saves_memory: Some(4),
            ..ParameterizationSpec::plain(Entry {
                options: || OptionList::of(&SlTrainOptions::default()),
                papers: &[Paper {
                    title: "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
                    place: "2406.02214",
                }],
                memory: "r (d_in + d_out) + k, and k positions of 4 bytes; k = density d_in d_out",
                ..Entry::plain(Kind::Parameterization, "sltrain", "two factors and a sparse matrix")
            })
        };
        SPEC
    }

    fn check_shape(&self, shape @ [d_in, d_out]: [usize; 2]) -> Result<(), String> {
        rank_fits(self.rank, shape)?;
        match (self.positions(shape), d_in * d_out) {
            (0, whole) => Err(format!("density {} of its {whole} positions is less than one", self.density)),
            (_, whole) if whole > i32::MAX as usize => {
                Err("positions of 32 bits do not suffice for so large a weight".into())
            }
            _ => Ok(()),
        }
    }

    fn values(&self, shape @ [d_in, d_out]: [usize; 2]) -> usize {
        self.rank * (d_in + d_out) + self.positions(shape) + usize::from(self.trained_scale)
    }

    /// A whole number of positions, never rounded up.
    fn positions(&self, [d_in, d_out]: [usize; 2]) -> usize {
        (self.density * (d_in * d_out) as f64) as usize
    }

    fn kept(&self, _d_in: usize) -> usize {
        0
    }

    /// The weight is formed in both passes, and its gradient is multiplied with both factors.
    fn operations(&self, [d_in, d_out]: [usize; 2], rows: usize) -> [u64; 2] {
        let [dense, formed] = [rows, self.rank].map(|depth| 2 * (depth * d_in * d_out) as u64);
        [dense + formed, 2 * dense + 3 * formed]
    }

    fn build(
        &self,
        builder: &mut Builder,
        path: &str,
        shape @ [d_in, d_out]: [usize; 2],
    ) -> Result<SlTrain, ModelError> {
        let (rank, count) = (self.rank, self.positions(shape));
        let bound = Init::Uniform((d_in as f64).sqrt().recip());
        let name = |part: &str| format!("{path}.{part}");
        Ok(SlTrain {
            a: builder.matrix(&name("a"), [d_in, rank], Layout::Transposed, bound)?,
            b: builder.matrix(&name("b"), [rank, d_out], Layout::Transposed, Init::Constant(0.0))?,
            sparse_value: builder.vector(&name("sparse_value"), count, bound)?,
            sparse_index: builder.positions(&name("sparse_index"), count, d_in * d_out, None)?,
            scaling: match self.trained_scale {
                true => Some(builder.vector(&name("scaling"), 1, Init::Constant(1.0))?),
                false => None,
            },
            bias: None,
            scale: self.alpha / rank as f64,
        })
    }
}

/// `y = s x A B + x S`, where `S` holds trained values at fixed random positions. The dense weight is never formed.
#[derive(Module, Debug)]
pub struct SlTrain {
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`, zero at the start.
    pub b: Param<Tensor<2>>,
    /// Values of the sparse part, one per position.
    pub sparse_value: Param<Tensor<1>>,
    /// Positions `output * d_in + input`, ascending; drawn once and never changed.
    pub sparse_index: Param<Tensor<1, Int>>,
    /// `q` of a scale `tanh(q)` that is trained; none for `alpha / rank`.
    pub scaling: Option<Param<Tensor<1>>>,
    /// Bias `[d_out]`; none in families without.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    scale: f64,
}

impl SlTrain {
    /// A layer of given parts; positions ascend and lie below `d_in * d_out`.
    pub fn from_parts(
        a: Tensor<2>,
        b: Tensor<2>,
        sparse_value: Tensor<1>,
        sparse_index: Tensor<1, Int>,
        alpha: f64,
        scaling: Option<Tensor<1>>,
    ) -> Self {
        let rank = a.dims()[1];
        Self {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            sparse_value: Param::from_tensor(sparse_value),
            sparse_index: Param::initialized(ParamId::new(), sparse_index),
            scaling: scaling.map(Param::from_tensor),
            bias: None,
            scale: alpha / rank as f64,
        }
    }
}

impl LinearLayer for SlTrain {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let (a, scale) = match &self.scaling {
            // On the small factor, so that the gradient of the scale is a sum over it.
            Some(q) => (ops::widened(self.a.val()) * q.val().tanh().unsqueeze::<2>(), 1.0),
            None => (self.a.val(), self.scale),
        };
        let y = ops::sparse_low_rank(x, a, self.b.val(), self.sparse_value.val(), self.sparse_index.val(), scale);
        plus_bias(y, &self.bias)
    }

    fn to_dense(&self) -> Option<Tensor<2>> {
        let scale = match &self.scaling {
            Some(q) => q.val().inner().tanh().unsqueeze::<2>(),
            None => Tensor::full([1, 1], self.scale, &self.b.val().inner().device()),
        };
        let product = ops::widened(self.a.val().inner()).matmul(ops::widened(self.b.val().inner())) * scale;
        let shape = product.dims();
        Some(product + ops::sparse_matrix(self.sparse_value.val().inner(), self.sparse_index.val(), shape))
    }

    fn bias_mut(&mut self) -> &mut Option<Param<Tensor<1>>> {
        &mut self.bias
    }
}
