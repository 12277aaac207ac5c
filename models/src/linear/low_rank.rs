//! The product of two factors ("Exploring Low Rank Training of Deep Neural Networks", arXiv 2209.13569).

use std::cell::OnceCell;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_optim::leading_directions;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layer::{LinearLayer, plus_bias};
use super::parameterization::{LinearMethod, ParameterizationSpec, rank_fits};
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init, Layout, RandomWeights, WeightSource, host};

/// Initialisation of the factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LowRankInit {
    /// The best approximation of the dense weight that a dense layer would start from.
    Spectral,
    /// Normal draws, the first factor of deviation `1 / sqrt(d_in)`, the second of `1 / sqrt(rank)`.
    Gaussian,
    /// The first factor uniform, the second zero.
    Lora,
}

/// Options of a plain low-rank layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LowRankOptions {
    /// Width between the factors, at most the smaller side of a layer. A run that is given none takes a quarter of the
    /// model's width.
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// Initialisation of the factors.
    pub init: LowRankInit,
}

impl Default for LowRankOptions {
    fn default() -> Self {
        Self { rank: 128, init: LowRankInit::Spectral }
    }
}

impl LinearMethod for LowRankOptions {
    type Layer = LowRank;

    fn spec() -> &'static ParameterizationSpec {
        const SPEC: &ParameterizationSpec = &ParameterizationSpec::plain(Entry {
            options: || OptionList::of(&LowRankOptions::default()),
            papers: &[Paper { title: "Exploring Low Rank Training of Deep Neural Networks", place: "2209.13569" }],
            memory: "r (d_in + d_out)",
            ..Entry::plain(Kind::Parameterization, "low-rank", "the product of two factors")
        });
        SPEC
    }

    fn check_shape(&self, shape: [usize; 2]) -> Result<(), String> {
        rank_fits(self.rank, shape)
    }

    fn values(&self, [d_in, d_out]: [usize; 2]) -> usize {
        self.rank * (d_in + d_out)
    }

    fn kept(&self, _d_in: usize) -> usize {
        self.rank
    }

    fn build(&self, builder: &mut Builder, path: &str, shape @ [d_in, _]: [usize; 2]) -> Result<LowRank, ModelError> {
        let rank = self.rank;
        let factors = OnceCell::new();
        let spectral =
            |random: &mut RandomWeights| once(&factors, || spectral_factors(random, path, shape, rank)).cloned();
        let first = |random: &mut RandomWeights| Ok(spectral(random)?.0);
        let second = |random: &mut RandomWeights| Ok(spectral(random)?.1);
        let bound = (d_in as f64).sqrt().recip();
        let inits = match self.init {
            LowRankInit::Spectral => [Init::Computed(&first), Init::Computed(&second)],
            LowRankInit::Gaussian => [Init::Normal(bound), Init::Normal((rank as f64).sqrt().recip())],
            LowRankInit::Lora => [Init::Uniform(bound), Init::Constant(0.0)],
        };
        LowRank::at(builder, path, shape, rank, inits)
    }
}

/// `y = x A B`, and the bias where the family has one.
#[derive(Module, Debug)]
pub struct LowRank {
    /// First factor `[d_in, rank]`.
    pub a: Param<Tensor<2>>,
    /// Second factor `[rank, d_out]`.
    pub b: Param<Tensor<2>>,
    /// Bias `[d_out]`; none in families without.
    pub bias: Option<Param<Tensor<1>>>,
}

impl LowRank {
    /// The layer at a path; `inits` are the initialisations of the factors.
    pub(super) fn at(
        builder: &mut Builder,
        path: &str,
        [d_in, d_out]: [usize; 2],
        rank: usize,
        [first, second]: [Init; 2],
    ) -> Result<Self, ModelError> {
        Ok(Self {
            a: builder.matrix(&format!("{path}.a"), [d_in, rank], Layout::Transposed, first)?,
            b: builder.matrix(&format!("{path}.b"), [rank, d_out], Layout::Transposed, second)?,
            bias: None,
        })
    }
}

impl LinearLayer for LowRank {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        plus_bias(ops::linear(ops::linear(x, self.a.val()), self.b.val()), &self.bias)
    }

    fn to_dense(&self) -> Option<Tensor<2>> {
        Some(ops::widened(self.a.val().inner()).matmul(ops::widened(self.b.val().inner())))
    }

    fn bias_mut(&mut self) -> &mut Option<Param<Tensor<1>>> {
        &mut self.bias
    }
}

/// The factors of the best approximation of the usual dense initialisation, which share the roots of its singular values.
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
    // A direction with singular value 0 has no left vector; its factors are zero.
    let roots = singular.clone().sqrt();
    let a = left / roots.clone().clamp_min(f32::MIN_POSITIVE);
    let b = (right * roots).transpose();
    Ok((host(a), host(b)))
}

/// Computes an initialisation that several parameters of a layer share, only once.
pub(super) fn once<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T, ModelError>) -> Result<&T, ModelError> {
    match cell.get() {
        Some(made) => Ok(made),
        None => {
            let made = make()?;
            Ok(cell.get_or_init(|| made))
        }
    }
}
