//! Subspaces of a matrix and their storage.

use burn::optim::{RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowrank_kernels::dct::{Dct, DctBasis};
use lowrank_kernels::host;
use lowrank_kernels::ops::MatrixProduct;
use lowrank_kernels::random::{generator, normal};

use crate::state::quantised::QuantisedMatrix;

/// A subspace of the gradient of an `[R, C]` matrix. On the right it is spanned by vectors of `n = C` values and the low-rank gradient is
/// `G P`, `[R, r]`; on the left `n = R` and it is `P^T G`, `[r, C]`.
// There is one per matrix: some hundred bytes in addition to moments of thousands of elements.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub enum Subspace {
    /// The whole matrix.
    Whole,
    /// No part of it.
    Nothing,
    /// Columns `[n, r]`.
    Dense(Tensor<2>),
    /// Left columns `[R, r]` and right columns `[C, r]`; the low-rank gradient is `P_L^T G P_R`, `[r, r]`.
    TwoSided(Tensor<2>, Tensor<2>),
    /// Columns `[n, r]` as small integers.
    Quantised(QuantisedMatrix),
    /// Columns of a fixed orthonormal basis, ascending; only their indices are stored.
    Dct(DctBasis, Tensor<1, Int>),
    /// Unit vectors, ascending: columns of the matrix on the right, rows on the left.
    Coordinates(Tensor<1, Int>),
    /// Single values of the matrix by their place in row-major order, ascending; the low-rank gradient is `[1, k]`.
    Entries(Tensor<1, Int>),
    /// Independent normal draws of variance `1 / r`, `[n, r]`, rebuilt from their numbers instead of stored.
    Gaussian {
        /// Seed of the run.
        seed: u64,
        /// Number of the matrix.
        key: u64,
        /// Number of the renewal.
        count: u64,
        /// Columns.
        rank: usize,
    },
}

impl Subspace {
    /// Vectors that span it, `[n, r]`, if it consists of vectors.
    pub fn columns(&self, n: usize, device: &Device) -> Option<Tensor<2>> {
        match self {
            Self::Dense(columns) => Some(columns.clone()),
            Self::Quantised(matrix) => Some(matrix.restored()),
            Self::Dct(basis, indices) => Some(Dct::of(n).tensor(*basis, device).select(1, indices.clone())),
            Self::Coordinates(indices) => Some(Tensor::eye(n, device).select(1, indices.clone())),
            Self::Gaussian { seed, key, count, rank } => {
                let scale = (*rank as f32).sqrt().recip();
                let draws = normal(&mut generator(*seed, *key, *count), n * rank);
                let values = draws.into_iter().map(|x| x * scale).collect::<Vec<f32>>();
                Some(Tensor::from_data(TensorData::new(values, [n, *rank]), device))
            }
            Self::Whole | Self::Nothing | Self::TwoSided(..) | Self::Entries(_) => None,
        }
    }

    /// Indices of its vectors or elements, if it is stored by indices.
    pub fn indices(&self) -> Option<Vec<i32>> {
        match self {
            Self::Dct(_, indices) | Self::Coordinates(indices) | Self::Entries(indices) => Some(host::indices(indices)),
            _ => None,
        }
    }

    /// Computes the columns once for the products of a step.
    pub(crate) fn open(&self, shape: [usize; 2], right: bool, device: &Device) -> Open {
        let n = if right { shape[1] } else { shape[0] };
        let columns = match self {
            Self::Coordinates(_) => None,
            other => other.columns(n, device),
        };
        Open { subspace: self.clone(), columns, shape, right }
    }

    pub(crate) fn to_device(&self, device: &Device) -> Self {
        match self.clone() {
            Self::Dense(columns) => Self::Dense(columns.to_device(device)),
            Self::TwoSided(left, right) => Self::TwoSided(left.to_device(device), right.to_device(device)),
            Self::Quantised(matrix) => Self::Quantised(matrix.to_device(device)),
            Self::Dct(basis, indices) => Self::Dct(basis, indices.to_device(device)),
            Self::Coordinates(indices) => Self::Coordinates(indices.to_device(device)),
            Self::Entries(indices) => Self::Entries(indices.to_device(device)),
            other => other,
        }
    }
}

/// A subspace of a matrix of known shape, with its columns in memory.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub subspace: Subspace,
    pub columns: Option<Tensor<2>>,
    shape: [usize; 2],
    right: bool,
}

impl Open {
    /// The low-rank gradient; none for the empty subspace.
    pub fn project(&self, g: &Tensor<2>) -> Option<Tensor<2>> {
        let axis = usize::from(self.right);
        match (&self.subspace, &self.columns) {
            (Subspace::Nothing, _) => None,
            (Subspace::Whole, _) => Some(g.clone()),
            (Subspace::TwoSided(left, right), _) => {
                Some(left.clone().transpose().times(g.clone()).times(right.clone()))
            }
            (Subspace::Coordinates(indices), _) => Some(g.clone().select(axis, indices.clone())),
            (Subspace::Entries(indices), _) => {
                let [rows, columns] = self.shape;
                Some(g.clone().reshape([1, rows * columns]).select(1, indices.clone()))
            }
            (_, Some(p)) if self.right => Some(g.clone().times(p.clone())),
            (_, Some(p)) => Some(p.clone().transpose().times(g.clone())),
            (_, None) => unreachable!("every other subspace has columns"),
        }
    }

    /// Projects a low-rank matrix back to full size.
    pub fn back(&self, low: &Tensor<2>) -> Tensor<2> {
        let axis = usize::from(self.right);
        match (&self.subspace, &self.columns) {
            (Subspace::Nothing, _) => Tensor::zeros(self.shape, &low.device()),
            (Subspace::Whole, _) => low.clone(),
            (Subspace::TwoSided(left, right), _) => left.clone().times(low.clone()).times(right.clone().transpose()),
            (Subspace::Coordinates(indices), _) => place(self.shape, axis, indices, low),
            (Subspace::Entries(indices), _) => {
                place([1, self.shape[0] * self.shape[1]], 1, indices, low).reshape(self.shape)
            }
            (_, Some(p)) if self.right => low.clone().times(p.clone().transpose()),
            (_, Some(p)) => p.clone().times(low.clone()),
            (_, None) => unreachable!("every other subspace has columns"),
        }
    }
}

/// Zeros with the values of `low` at the indices.
fn place(shape: [usize; 2], axis: usize, indices: &Tensor<1, Int>, low: &Tensor<2>) -> Tensor<2> {
    use burn::tensor::IndexingUpdateOp;
    Tensor::zeros(shape, &low.device()).select_assign(axis, indices.clone(), low.clone(), IndexingUpdateOp::Add)
}

/// Indices as a tensor of four bytes each.
pub(crate) fn index_tensor(indices: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let count = indices.len();
    Tensor::from_data(TensorData::new(indices, [count]), (device, DType::I32))
}

const DCT: [DctBasis; 3] = [DctBasis::Dct3, DctBasis::Dct2, DctBasis::Random];

// Written by hand, as the derive does not support enums.
impl RecordState for Subspace {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        let kind = |kind: &str, out: &mut StateSink| out.push_scalar(prefix, kind, true.into());
        match self {
            Self::Whole => kind("whole", out),
            Self::Nothing => kind("nothing", out),
            Self::Dense(columns) => out.push_tensor(prefix, "columns", columns.to_data()),
            Self::TwoSided(left, right) => {
                out.push_tensor(prefix, "left", left.to_data());
                out.push_tensor(prefix, "right", right.to_data());
            }
            Self::Quantised(matrix) => matrix.flatten(prefix, out),
            Self::Dct(basis, indices) => {
                let basis = DCT.iter().position(|known| known == basis).unwrap_or_default();
                out.push_scalar(prefix, "basis", basis.into());
                out.push_tensor(prefix, "indices", indices.to_data());
            }
            Self::Coordinates(indices) => out.push_tensor(prefix, "coordinates", indices.to_data()),
            Self::Entries(indices) => out.push_tensor(prefix, "entries", indices.to_data()),
            Self::Gaussian { seed, key, count, rank } => {
                for (name, value) in [("seed", *seed), ("key", *key), ("count", *count), ("rank", *rank as u64)] {
                    out.push_scalar(prefix, name, value.into());
                }
            }
        }
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, device: &Device) -> Option<Self> {
        let float = |data| Tensor::<2>::from_data(data, (device, DType::F32));
        let whole = |data| Tensor::<1, Int>::from_data(data, (device, DType::I32));
        if source.take_scalar(prefix, "whole").is_some() {
            return Some(Self::Whole);
        }
        if source.take_scalar(prefix, "nothing").is_some() {
            return Some(Self::Nothing);
        }
        if let Some(columns) = source.take_tensor(prefix, "columns") {
            return Some(Self::Dense(float(columns)));
        }
        if let Some(left) = source.take_tensor(prefix, "left") {
            return Some(Self::TwoSided(float(left), float(source.take_tensor(prefix, "right")?)));
        }
        if let Some(matrix) = QuantisedMatrix::unflatten(prefix, source, device) {
            return Some(Self::Quantised(matrix));
        }
        if let Some(indices) = source.take_tensor(prefix, "indices") {
            let basis: usize = source.take_scalar(prefix, "basis")?.try_into().ok()?;
            return Some(Self::Dct(*DCT.get(basis)?, whole(indices)));
        }
        if let Some(indices) = source.take_tensor(prefix, "coordinates") {
            return Some(Self::Coordinates(whole(indices)));
        }
        if let Some(indices) = source.take_tensor(prefix, "entries") {
            return Some(Self::Entries(whole(indices)));
        }
        let mut number = |name| source.take_scalar(prefix, name)?.try_into().ok();
        let (seed, key, count) = (number("seed")?, number("key")?, number("count")?);
        let rank: u64 = number("rank")?;
        Some(Self::Gaussian { seed, key, count, rank: rank as usize })
    }
}
