//! The product of two factors ("Exploring Low Rank Training of Deep Neural Networks", arXiv 2209.13569).

use std::cell::OnceCell;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_optim::leading_directions;

use super::config::LowRankInit;
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout, RandomWeights, WeightSource, host};

/// `y = x A B`.
#[derive(Module, Debug)]
pub struct LowRank {
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
}

impl LowRank {
    pub(super) fn build(
        builder: &mut Builder,
        path: &str,
        d_in: usize,
        d_out: usize,
        rank: usize,
        init: LowRankInit,
    ) -> Result<Self, ModelError> {
        let factors = OnceCell::new();
        let spectral = |random: &mut RandomWeights| {
            once(&factors, || spectral_factors(random, path, [d_in, d_out], rank)).cloned()
        };
        let first = |random: &mut RandomWeights| Ok(spectral(random)?.0);
        let second = |random: &mut RandomWeights| Ok(spectral(random)?.1);
        let bound = (d_in as f64).sqrt().recip();
        let (first, second) = match init {
            LowRankInit::Spectral => (Init::Computed(&first), Init::Computed(&second)),
            LowRankInit::Gaussian => (Init::Normal(bound), Init::Normal((rank as f64).sqrt().recip())),
            LowRankInit::Lora => (Init::Uniform(bound), Init::Constant(0.0)),
        };
        Ok(Self {
            a: builder.matrix(&format!("{path}.a"), [d_in, rank], Layout::Transposed, first)?,
            b: builder.matrix(&format!("{path}.b"), [rank, d_out], Layout::Transposed, second)?,
        })
    }

    /// `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::linear(ops::linear(x, self.a.val()), self.b.val())
    }

    pub(super) fn to_dense(&self) -> Tensor<2> {
        self.a.val().inner().matmul(self.b.val().inner())
    }
}

/// The factors of the best approximation of an ordinary dense beginning, which share the roots of its singular values.
pub(super) fn spectral_factors(
    random: &mut RandomWeights,
    path: &str,
    [d_in, d_out]: [usize; 2],
    rank: usize,
) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
    let device = Device::default();
    let values = random.matrix(&format!("{path}.weight"), [d_in, d_out], Layout::Transposed, Init::Standard)?;
    let dense = Tensor::<2>::from_data(TensorData::new(values, [d_in, d_out]), &device);
    let right = leading_directions(&dense, rank, true)
        .map_err(|reason| ModelError::Config(format!("{path}.weight has no leading directions: {reason}")))?;
    let left = dense.matmul(right.clone());
    let singular = left.clone().square().sum_dim(0).sqrt();
    // A direction without energy has no left vector; its factors are zero.
    let roots = singular.clone().sqrt();
    let a = left / roots.clone().clamp_min(f32::MIN_POSITIVE);
    let b = (right * roots).transpose();
    Ok((host(a), host(b)))
}

/// What several parameters of a layer begin with is computed once.
pub(super) fn once<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T, ModelError>) -> Result<&T, ModelError> {
    match cell.get() {
        Some(made) => Ok(made),
        None => {
            let made = make()?;
            Ok(cell.get_or_init(|| made))
        }
    }
}
