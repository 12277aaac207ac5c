//! AdamW in a subspace of columns of the discrete cosine transform.

use burn::config::Config;
use burn::optim::{ModuleOptimizer, Optimizer, RecordState};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::dct::{Basis, Dct};
use crate::error_feedback::{ErrorBuffer, ErrorFeedback};
use crate::{AdamW, AdamWConfig, AdamWState, OptimError};

/// Which side of a matrix is projected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The smaller dimension; of a square matrix the columns.
    Std,
    /// The rows.
    Left,
    /// The columns.
    Right,
}

/// How a row or column of the transformed gradient is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Norm {
    /// Sum of absolute values.
    L1,
    /// Root of the sum of squares; keeps the most energy.
    L2,
}

/// Configuration of [`DctAdamW`].
#[derive(Config, Debug)]
pub struct DctAdamWConfig {
    /// Basis vectors that are kept; at least 1. A matrix whose projected side is smaller takes plain AdamW.
    pub rank: usize,
    /// Steps between choices of basis vectors, at least 1: at steps 1, gap, 2 gap and so on.
    #[config(default = 1)]
    pub update_proj_gap: usize,
    /// Side that is projected.
    #[config(default = "Side::Std")]
    pub side: Side,
    /// Whether the basis is that of the DCT-II rather than of the DCT-III.
    #[config(default = false)]
    pub dct2: bool,
    /// Whether all coefficients come from a fast Fourier transform rather than a matrix product; speed alone.
    #[config(default = false)]
    pub fft: bool,
    /// Score of a basis vector.
    #[config(default = "Norm::L1")]
    pub norm: Norm,
    /// Whether moments move with their basis vectors when others are chosen.
    #[config(default = true)]
    pub rotate: bool,
    /// Whether what the projection leaves out is kept for the next step.
    #[config(default = true)]
    pub error_feedback: bool,
    /// Steps of the kept rest's quantisation, 1 to 255; 0 keeps it in f32. Up to 15 a value takes half a byte.
    #[config(default = 255)]
    pub error_levels: u8,
    /// Matrices with a side of this size or more take plain AdamW.
    #[config(default = 32_000)]
    pub max_shape: usize,
    /// Decay of the first moment, from 0 to below 1.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// Decay of the second moment, from 0 to below 1.
    #[config(default = 0.999)]
    pub beta_2: f64,
    /// Added to the root of the second moment, greater than 0.
    #[config(default = 1e-8)]
    pub epsilon: f64,
    /// Decoupled weight decay, 0 or greater.
    #[config(default = 0.0)]
    pub weight_decay: f64,
}

impl DctAdamWConfig {
    /// Refuses values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        for (option, value) in
            [("rank", self.rank), ("update_proj_gap", self.update_proj_gap), ("max_shape", self.max_shape)]
        {
            if value == 0 {
                return Err(OptimError::Value { option, value: "0".into(), reason: "it must be at least 1".into() });
            }
        }
        Ok(())
    }

    /// The bare optimizer, for [`ModuleOptimizer::with_group`].
    pub fn build(&self) -> DctAdamW {
        let plain = AdamWConfig::new()
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay);
        DctAdamW { plain: plain.build(), config: self.clone() }
    }

    /// The optimizer of a whole module.
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.build())
    }

    /// Whether a matrix of this shape is projected, and then whether on the right.
    pub fn projects(&self, [rows, columns]: [usize; 2]) -> Option<bool> {
        let right = match self.side {
            Side::Std => rows >= columns,
            Side::Left => false,
            Side::Right => true,
        };
        let side = if right { columns } else { rows };
        (self.rank <= side && rows.max(columns) < self.max_shape).then_some(right)
    }

    /// Bytes of state for a matrix of this shape.
    pub fn state_bytes(&self, shape @ [rows, columns]: [usize; 2]) -> usize {
        let Some(right) = self.projects(shape) else { return 8 * rows * columns };
        let long = if right { rows } else { columns };
        let rest = match self.how() {
            ErrorFeedback::None => 0,
            ErrorFeedback::Full => 4 * rows * columns,
            ErrorFeedback::Quantised { levels: 0..=15 } => rows * columns.div_ceil(2) + 8 * rows,
            ErrorFeedback::Quantised { .. } => rows * columns + 8 * rows,
        };
        8 * long * self.rank + 4 * self.rank + rest
    }

    fn how(&self) -> ErrorFeedback {
        match (self.error_feedback, self.error_levels) {
            (false, _) => ErrorFeedback::None,
            (true, 0) => ErrorFeedback::Full,
            (true, levels) => ErrorFeedback::Quantised { levels },
        }
    }
}

/// DCT-AdamW: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models" (Modoranu et al., arXiv
/// 2505.17967).
///
/// The moments of a matrix live in the span of the columns of one orthonormal DCT matrix that carry most of its gradient; only their indices are
/// stored. Matrices are taken as they are stored: Burn's linear layers hold `[d_in, d_out]`, so that for a square weight the standard side is the
/// transpose of a PyTorch run; [`DctAdamWConfig::side`] chooses. Arithmetic and moments are f32. A gradient with values that are not finite must be
/// refused before ([`GlobalNormClip`](crate::rules::GlobalNormClip) does).
#[derive(Clone, Debug)]
pub struct DctAdamW {
    plain: AdamW,
    config: DctAdamWConfig,
}

/// State of [`DctAdamW`] for one parameter: that of plain AdamW, or that of a projected matrix.
#[derive(Clone, Debug, RecordState)]
pub struct DctAdamWState<const D: usize> {
    /// Of a parameter that is not projected.
    pub plain: Option<AdamWState<D>>,
    /// Of a projected matrix.
    pub projected: Option<ProjectedState>,
}

/// State of a matrix whose moments live in a subspace.
#[derive(Clone, Debug, RecordState)]
pub struct ProjectedState {
    /// Steps taken.
    pub time: usize,
    /// Moving average of the projected gradient: `[rows, rank]` on the right, `[rank, columns]` on the left.
    pub moment_1: Tensor<2>,
    /// Moving average of its square.
    pub moment_2: Tensor<2>,
    /// Chosen basis vectors, ascending.
    pub indices: Tensor<1, Int>,
    /// What the projection left out.
    pub error: Option<ErrorBuffer>,
}

impl Optimizer for DctAdamW {
    type State<const D: usize> = DctAdamWState<D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<DctAdamWState<D>>,
    ) -> (Tensor<D>, Option<DctAdamWState<D>>) {
        let shape = tensor.dims();
        let matrix = <[usize; 2]>::try_from(&shape[..]).ok();
        let Some((shape2, right)) = matrix.and_then(|shape| Some((shape, self.config.projects(shape)?))) else {
            let (tensor, plain) = self.plain.step(lr, tensor, grad, state.and_then(|state| state.plain));
            return (tensor, Some(DctAdamWState { plain, projected: None }));
        };
        let dtype = tensor.dtype();
        let (w, g) = (tensor.cast(DType::F32).reshape(shape2), grad.cast(DType::F32).reshape(shape2));
        let (w, projected) = self.step_matrix(lr, w, g, state.and_then(|state| state.projected), right);
        (w.cast(dtype).reshape(shape), Some(DctAdamWState { plain: None, projected: Some(projected) }))
    }

    fn to_device<const D: usize>(state: DctAdamWState<D>, device: &Device) -> DctAdamWState<D> {
        DctAdamWState {
            plain: state.plain.map(|plain| AdamW::to_device(plain, device)),
            projected: state.projected.map(|state| ProjectedState {
                time: state.time,
                moment_1: state.moment_1.to_device(device),
                moment_2: state.moment_2.to_device(device),
                indices: state.indices.to_device(device),
                error: state.error.map(|error| error.to_device(device)),
            }),
        }
    }
}

impl DctAdamW {
    fn step_matrix(
        &self,
        lr: f64,
        w: Tensor<2>,
        g: Tensor<2>,
        state: Option<ProjectedState>,
        right: bool,
    ) -> (Tensor<2>, ProjectedState) {
        let c = &self.config;
        let time = state.as_ref().map_or(0, |state| state.time) + 1;
        let w = w.mul_scalar(1.0 - lr * c.weight_decay);
        let a = match state.as_ref().and_then(|state| state.error.as_ref()?.restored()) {
            Some(error) => g + error,
            None => g,
        };
        let axis = if right { 1 } else { 0 };
        let (indices, basis, low) = match &state {
            Some(state) if !time.is_multiple_of(c.update_proj_gap) => {
                let basis = self.columns(&a, axis, &state.indices);
                let low = project(&a, &basis, right);
                (state.indices.clone(), basis, low)
            }
            _ => {
                let coefficients = self.coefficients(&a, axis);
                let indices = self.choose(&coefficients, axis);
                let low = coefficients.select(axis, indices.clone());
                let basis = self.columns(&a, axis, &indices);
                (indices, basis, low)
            }
        };
        let error = match c.how() {
            ErrorFeedback::None => None,
            how => ErrorBuffer::keep(a - back(&low, &basis, right), how),
        };
        let (m, v) = match state {
            None => (low.zeros_like(), low.zeros_like()),
            Some(state) if c.rotate => {
                let (old, new) = (host_indices(&state.indices), host_indices(&indices));
                (carry(state.moment_1, axis, &old, &new), carry(state.moment_2, axis, &old, &new))
            }
            Some(state) => (state.moment_1, state.moment_2),
        };
        let m = m.mul_scalar(c.beta_1) + low.clone().mul_scalar(1.0 - c.beta_1);
        let v = v.mul_scalar(c.beta_2) + low.square().mul_scalar(1.0 - c.beta_2);
        let rate = lr / (1.0 - c.beta_1.powf(time as f64));
        let root = (1.0 - c.beta_2.powf(time as f64)).sqrt().recip();
        let direction = m.clone() / v.clone().sqrt().mul_scalar(root).add_scalar(c.epsilon);
        let w = w - back(&direction, &basis, right).mul_scalar(rate);
        (w, ProjectedState { time, moment_1: m, moment_2: v, indices, error })
    }

    /// `D`, `n x n`.
    fn matrix(&self, n: usize, device: &Device) -> Tensor<2> {
        let c = Tensor::<2>::from_data(TensorData::new(Dct::of(n).matrix().to_vec(), [n, n]), device);
        if self.config.dct2 { c.transpose() } else { c }
    }

    /// Chosen columns of `D`, `n x r`.
    fn columns(&self, a: &Tensor<2>, axis: usize, indices: &Tensor<1, Int>) -> Tensor<2> {
        let n = a.dims()[axis];
        let (dct, chosen) = (Dct::of(n), host_indices(indices));
        let entry = |row: usize, column: usize| match self.config.dct2 {
            true => dct.matrix()[column * n + row],
            false => dct.matrix()[row * n + column],
        };
        let values = (0..n).flat_map(|row| chosen.iter().map(move |column| entry(row, *column as usize)));
        Tensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), [n, chosen.len()]), &a.device())
    }

    /// `A D` on the right, `D^T A` on the left.
    fn coefficients(&self, a: &Tensor<2>, axis: usize) -> Tensor<2> {
        let n = a.dims()[axis];
        let turn = |x: Tensor<2>| if axis == 1 { x } else { x.transpose() };
        if !self.config.fft {
            return turn(turn(a.clone()).matmul(self.matrix(n, &a.device())));
        }
        let rows = turn(a.clone());
        let (shape, device) = (rows.dims(), rows.device());
        let mut values = host(rows);
        let basis = if self.config.dct2 { Basis::Dct2 } else { Basis::Dct3 };
        Dct::of(n).transform_rows(&mut values, basis);
        turn(Tensor::from_data(TensorData::new(values, shape), &device))
    }

    /// The basis vectors with the best scores, ascending; of equal ones the lower index.
    fn choose(&self, coefficients: &Tensor<2>, axis: usize) -> Tensor<1, Int> {
        let scores = match self.config.norm {
            Norm::L1 => coefficients.clone().abs(),
            Norm::L2 => coefficients.clone().square(),
        };
        let scores = host(scores.sum_dim(1 - axis));
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        order.truncate(self.config.rank);
        order.sort_unstable();
        let indices: Vec<i32> = order.into_iter().map(|index| index as i32).collect();
        let shape = [indices.len()];
        Tensor::from_data(TensorData::new(indices, shape), (&coefficients.device(), DType::I32))
    }
}

fn project(a: &Tensor<2>, basis: &Tensor<2>, right: bool) -> Tensor<2> {
    match right {
        true => a.clone().matmul(basis.clone()),
        false => basis.clone().transpose().matmul(a.clone()),
    }
}

fn back(low: &Tensor<2>, basis: &Tensor<2>, right: bool) -> Tensor<2> {
    match right {
        true => low.clone().matmul(basis.clone().transpose()),
        false => basis.clone().matmul(low.clone()),
    }
}

/// Moves each basis vector's moments to its new place; those of vectors that are new start at 0.
fn carry(moment: Tensor<2>, axis: usize, old: &[i32], new: &[i32]) -> Tensor<2> {
    if old == new {
        return moment;
    }
    let mut shape = moment.dims();
    shape[axis] = 1;
    let zeros = Tensor::zeros(shape, (&moment.device(), DType::F32));
    let places: Vec<i32> = new.iter().map(|index| old.binary_search(index).unwrap_or(old.len()) as i32).collect();
    let count = places.len();
    let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &moment.device());
    Tensor::cat(vec![moment, zeros], axis).select(axis, places)
}

fn host(x: Tensor<2>) -> Vec<f32> {
    match x.into_data().convert::<f32>().try_into_vec() {
        Ok(values) => values,
        Err(error) => unreachable!("data converted to f32 is f32: {error:?}"),
    }
}

fn host_indices(indices: &Tensor<1, Int>) -> Vec<i32> {
    match indices.to_data().convert::<i32>().try_into_vec() {
        Ok(values) => values,
        Err(error) => unreachable!("data converted to i32 is i32: {error:?}"),
    }
}
