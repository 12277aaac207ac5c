//! The linear layer that every weight matrix of a block goes through, and what it may hold instead of a dense weight.
//!
//! Matrices are stored `[d_in, d_out]` and `y = x W`; the papers and the files write the transposes, `d_out x d_in`.

mod cola;
mod config;
mod dense;
mod loro;
mod lost;
mod low_rank;
mod relora;
mod sltrain;

use burn::module::Module;
use burn::tensor::Tensor;

pub use cola::Cola;
pub use config::{LowRankInit, PARAMETERIZATIONS, Parameterization, ParameterizationMethod};
pub use dense::Dense;
pub use lost::{Lost, LostStart};
pub use low_rank::LowRank;
pub use relora::ReLora;
pub use sltrain::SlTrain;

pub(crate) use relora::trained;

use crate::error::ModelError;
use crate::weights::Builder;

/// A linear layer without bias.
#[derive(Module, Debug)]
pub enum Linear {
    /// One dense weight.
    Dense(Dense),
    /// The product of two factors.
    LowRank(LowRank),
    /// Two factors and a sparse matrix.
    SlTrain(SlTrain),
    /// Two factors with a non-linearity between them.
    Cola(Cola),
    /// Two factors with a non-linearity, and whole input channels.
    Lost(Lost),
    /// A frozen weight and two factors that are added to it again and again.
    ReLora(ReLora),
}

impl Linear {
    pub(crate) fn build(
        builder: &mut Builder,
        path: &str,
        d_in: usize,
        d_out: usize,
        parameterization: &Parameterization,
    ) -> Result<Self, ModelError> {
        parameterization.check_shape(path, d_in, d_out)?;
        Ok(match parameterization {
            Parameterization::Dense => Self::Dense(Dense::build(builder, path, d_in, d_out)?),
            Parameterization::LowRank { rank, init } => {
                Self::LowRank(LowRank::build(builder, path, d_in, d_out, *rank, *init)?)
            }
            Parameterization::SlTrain { rank, alpha, density, trained_scale } => {
                Self::SlTrain(SlTrain::build(builder, path, [d_in, d_out], *rank, *alpha, *density, *trained_scale)?)
            }
            Parameterization::Cola { rank, .. } => Self::Cola(Cola::build(builder, path, d_in, d_out, *rank)?),
            Parameterization::Lost { rank, density, gamma } => {
                Self::Lost(Lost::build(builder, path, [d_in, d_out], *rank, *density, *gamma)?)
            }
            Parameterization::Loro { rank, .. } => {
                Self::LowRank(LowRank::build_loro(builder, path, d_in, d_out, *rank)?)
            }
            Parameterization::ReLora { rank, alpha, trained_scale, .. } => {
                Self::ReLora(ReLora::build(builder, path, [d_in, d_out], *rank, *alpha, *trained_scale)?)
            }
        })
    }

    /// `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(layer) => layer.forward(x),
            Self::LowRank(layer) => layer.forward(x),
            Self::SlTrain(layer) => layer.forward(x),
            Self::Cola(layer) => layer.forward(x),
            Self::Lost(layer) => layer.forward(x),
            Self::ReLora(layer) => layer.forward(x),
        }
    }

    /// The dense weight `[d_in, d_out]` that gives the same outputs, without gradient; none where a non-linearity stands between the factors.
    pub fn to_dense(&self) -> Option<Tensor<2>> {
        match self {
            Self::Dense(layer) => Some(layer.weight.val().inner()),
            Self::LowRank(layer) => Some(layer.to_dense()),
            Self::SlTrain(layer) => Some(layer.to_dense()),
            Self::ReLora(layer) => Some(layer.to_dense()),
            Self::Cola(_) | Self::Lost(_) => None,
        }
    }
}
