//! Sparse plus low rank ("SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", arXiv 2406.02214).

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Int, Tensor};

use super::config::entries;
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout};

/// `y = s x A B + x S`, where `S` holds trained values at fixed random positions. The dense weight is never formed.
#[derive(Module, Debug)]
pub struct SlTrain {
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`, zero at the start.
    pub b: Param<Tensor<2>>,
    /// Values of the sparse part, one a position.
    pub sparse_value: Param<Tensor<1>>,
    /// Positions `output * d_in + input`, ascending; drawn once and never changed.
    pub sparse_index: Param<Tensor<1, Int>>,
    /// `q` of a scale `tanh(q)` that is trained; none for `alpha / rank`.
    pub scaling: Option<Param<Tensor<1>>>,
    #[module(skip)]
    scale: f64,
}

impl SlTrain {
    pub(super) fn build(
        builder: &mut Builder,
        path: &str,
        [d_in, d_out]: [usize; 2],
        rank: usize,
        alpha: f64,
        density: f64,
        trained_scale: bool,
    ) -> Result<Self, ModelError> {
        let bound = Init::Uniform((d_in as f64).sqrt().recip());
        let count = entries(density, d_in, d_out);
        let name = |part: &str| format!("{path}.{part}");
        Ok(Self {
            a: builder.matrix(&name("a"), [d_in, rank], Layout::Transposed, bound)?,
            b: builder.matrix(&name("b"), [rank, d_out], Layout::Transposed, Init::Constant(0.0))?,
            sparse_value: builder.vector(&name("sparse_value"), count, bound)?,
            sparse_index: builder.positions(&name("sparse_index"), count, d_in * d_out, None)?,
            scaling: match trained_scale {
                true => Some(builder.vector(&name("scaling"), 1, Init::Constant(1.0))?),
                false => None,
            },
            scale: alpha / rank as f64,
        })
    }

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
            scale: alpha / rank as f64,
        }
    }

    /// `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let (a, scale) = match &self.scaling {
            // On the small factor, so that the gradient of the scale is a sum over it.
            Some(q) => (self.a.val() * q.val().tanh().unsqueeze::<2>(), 1.0),
            None => (self.a.val(), self.scale),
        };
        ops::sparse_low_rank(x, a, self.b.val(), self.sparse_value.val(), self.sparse_index.val(), scale)
    }

    /// The dense weight `[d_in, d_out]`.
    pub fn to_dense(&self) -> Tensor<2> {
        let scale = match &self.scaling {
            Some(q) => q.val().inner().tanh().unsqueeze::<2>(),
            None => Tensor::full([1, 1], self.scale, &self.b.val().inner().device()),
        };
        let product = self.a.val().inner().matmul(self.b.val().inner()) * scale;
        let shape = product.dims();
        product + ops::sparse_matrix(self.sparse_value.val().inner(), self.sparse_index.val(), shape)
    }
}
