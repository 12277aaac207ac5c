//! Column-normalised descent with momentum in the output head.

use burn::config::Config;
use burn::optim::RecordState;
use burn::tensor::{DType, Device, Tensor};
use lowrank_kernels::elementwise::descend;
use lowrank_kernels::host::{Memory, is_cpu};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adam::{AdamOptions, adam_builders};
use crate::error::OptimError;
use crate::matrix::{ByMatrix, MatrixRule};
use crate::matrix_id::MatrixId;
use crate::method::{MethodConfig, Table};
use crate::methods::adamw::AdamWConfig;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::registry::options;

/// Size of an output unit's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalisation {
    /// Root of the mean square, as in the published code: entries of an update have the size of the learning rate.
    Rms,
    /// Euclidean norm, as in the paper; the same learning rate is weaker by the root of the number of inputs.
    L2,
}

/// Configuration of SCALE: "A Minimalist Optimizer Design for LLM Pretraining" (Glentis, Li, Han and Hong, arXiv 2506.16659).
///
/// `W <- W (1 - lr wd) - lr D / s`, where `D` is the gradient, in the head its moving average, and `s` the size of each output unit's part of it.
/// An output unit is a column as Burn stores matrices: `[d_in, d_out]`, embeddings `[vocabulary, d]`. Matrices other than the head have no state.
/// An embedding that also serves as head is normalised as an embedding and has the head's momentum. Vectors use AdamW.
#[derive(Config, Debug, JsonSchema)]
pub struct ScaleConfig {
    /// Decay of the head's momentum (the paper's beta).
    #[config(default = 0.9)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub momentum: f64,
    /// Size of an output unit's gradient.
    #[config(default = "Normalisation::Rms")]
    pub normalisation: Normalisation,
    /// Smallest size that a gradient is divided by.
    #[config(default = 1e-8)]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub floor: f64,
    /// Learning rate of vectors as a multiple of that of the matrices.
    #[config(default = 20.0)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub others_lr_scale: f64,
    /// Options of AdamW for vectors; its weight decay applies to the matrices too.
    #[config(default = "AdamOptions::new()")]
    pub adam: AdamOptions,
}

adam_builders!(ScaleConfig);

/// SCALE's rule for one matrix.
#[derive(Clone, Debug)]
pub struct Scale {
    config: ScaleConfig,
    has_momentum: bool,
}

/// State of SCALE for one matrix.
#[derive(Clone, Debug, RecordState)]
pub struct ScaleState {
    /// Moving average of the head's gradient.
    pub momentum: Option<Tensor<2>>,
}

impl ScaleConfig {
    /// Rejects values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        Ok(options::validate(self)?)
    }

    /// AdamW of vectors.
    pub fn others(&self) -> AdamWConfig {
        AdamWConfig::new().with_adam(self.adam).with_legacy_epsilon(true).with_lr_scale(self.others_lr_scale)
    }

    /// The optimizer of matrices, with momentum for a head.
    pub fn build(&self, has_momentum: bool) -> ByMatrix<Scale> {
        ByMatrix::new(Scale { config: self.clone(), has_momentum }, self.others().build())
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = method!(
    ScaleConfig,
    ScaleConfig::new(),
    Entry {
        papers: &[Paper { title: "A Minimalist Optimizer Design for LLM Pretraining", place: "2506.16659" }],
        memory: "0; the head's momentum alone",
        lr: Some(1e-3),
        ..Entry::plain(Kind::Optimizer, "scale", "descent normalised by output units, momentum in the head alone")
    }
);

impl MethodConfig for ScaleConfig {
    type Optimizer = ByMatrix<Scale>;

    const NEEDS_MATRICES: bool = false;

    fn optimizer(&self) -> Result<ByMatrix<Scale>, OptimError> {
        self.validate()?;
        Ok(self.build(false))
    }

    fn at(optimizer: Self::Optimizer, place: MatrixId) -> Self::Optimizer {
        optimizer.at(place)
    }

    fn takes(&self, _shape: [usize; 2]) -> bool {
        true
    }

    fn others(&self) -> AdamWConfig {
        self.others()
    }

    fn state_bytes(&self, _shape: [usize; 2]) -> usize {
        0
    }

    fn of_table(&self, table: Table) -> Option<Self::Optimizer> {
        Some(self.build(table != Table::Embedding))
    }

    fn table_bytes(&self, table: Table, [rows, columns]: [usize; 2]) -> Option<usize> {
        Some(if table == Table::Embedding { 0 } else { 4 * rows * columns })
    }
}

impl MatrixRule for Scale {
    type State = ScaleState;

    fn takes(&self, _shape: [usize; 2]) -> bool {
        true
    }

    fn fresh(&self, shape: [usize; 2], _place: MatrixId, device: &Device) -> ScaleState {
        ScaleState { momentum: self.has_momentum.then(|| Tensor::zeros(shape, (device, DType::F32))) }
    }

    fn step(&self, lr: f64, w: Tensor<2>, g: Tensor<2>, state: ScaleState) -> (Tensor<2>, ScaleState) {
        let c = &self.config;
        let momentum = state.momentum.map(|m| m.mul_scalar(c.momentum) + g.clone().mul_scalar(1.0 - c.momentum));
        let direction = momentum.clone().unwrap_or(g);
        let direction = self.normalised(direction);
        (descend(w, 1.0 - lr * c.adam.weight_decay, lr, direction), ScaleState { momentum })
    }

    fn to_device(state: ScaleState, device: &Device) -> ScaleState {
        ScaleState { momentum: state.momentum.map(|momentum| momentum.to_device(device)) }
    }
}

impl Scale {
    /// Sizes of the columns of a direction, at least the floor.
    pub fn sizes(&self, direction: &Tensor<2>) -> Tensor<1> {
        let [rows, columns] = direction.dims();
        let share = if self.config.normalisation == Normalisation::Rms { 1.0 / rows.max(1) as f64 } else { 1.0 };
        if !is_cpu(&direction.device()) {
            let squares: Tensor<1> = direction.clone().square().sum_dim(0).reshape([columns]);
            return squares.mul_scalar(share).sqrt().clamp_min(self.config.floor);
        }
        let memory = Memory::of(direction.clone());
        let sizes: Vec<f32> = squares(memory.read(), columns)
            .into_iter()
            .map(|sum| (sum * share).sqrt().max(self.config.floor) as f32)
            .collect();
        Tensor::from_data(burn::tensor::TensorData::new(sizes, [columns]), &direction.device())
    }

    fn normalised(&self, direction: Tensor<2>) -> Tensor<2> {
        let sizes = self.sizes(&direction);
        direction / sizes.unsqueeze::<2>()
    }
}

/// Sums of the squares of each column, in f64 and in the order of the rows: no overflow at gradients of 1e30. NaN in a column is no size:
/// dividing its values keeps it.
fn squares(values: &[f32], columns: usize) -> Vec<f64> {
    const WIDTH: usize = 64;
    let mut sums = vec![0f64; columns];
    if columns == 0 {
        return sums;
    }
    sums.par_chunks_mut(WIDTH).enumerate().for_each(|(number, sums)| {
        for row in values.chunks_exact(columns) {
            let row = &row[number * WIDTH..][..sums.len()];
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value) * f64::from(*value));
        }
    });
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::optim::Optimizer;
    use burn::tensor::TensorData;
    use lowrank_kernels::host::values;

    fn wave(shape: [usize; 2], seed: f32) -> Tensor<2> {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.37 + seed).sin()).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::default())
    }

    #[test]
    fn every_unit_moves_by_the_learning_rate_whatever_its_gradient() {
        let optimizer = ScaleConfig::new().build(false);
        let factors = Tensor::<2>::from_data([[1e-5f32, 1.0, 1e20, 0.0, 3.0]], &Device::default());
        let (w, g) = (wave([12, 5], 0.0), wave([12, 5], 1.0));
        let (moved, state) = optimizer.step(0.1, w.clone(), g * factors, None);
        assert!(state.unwrap().matrix.unwrap().momentum.is_none());
        let lengths = values((moved - w).square().sum_dim(0).sqrt());
        for (column, length) in lengths.into_iter().enumerate() {
            let expected = if column == 3 { 0.0 } else { 0.1 * 12f32.sqrt() };
            assert!((length - expected).abs() < 1e-5, "{column}: {length}");
        }
        let (moved, _) = optimizer.step(0.1, wave([1, 5], 0.0), wave([1, 5], 1.0), None);
        let by_sign = wave([1, 5], 0.0) - wave([1, 5], 1.0).sign() * 0.1;
        assert!(values(moved - by_sign).iter().all(|x| x.abs() < 1e-6));
    }

    #[test]
    fn the_first_step_of_the_head_is_that_without_momentum() {
        let step = |has_momentum| {
            let optimizer = ScaleConfig::new().build(has_momentum);
            values(optimizer.step(0.1, wave([9, 4], 0.0), wave([9, 4], 1.0), None).0)
        };
        assert!(step(true).iter().zip(step(false)).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
