//! Maps between the spaces of two models.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};

use crate::linear::Dense;

/// The two maps of an alignment.
#[derive(Module, Debug)]
pub struct AlignmentMaps {
    /// From the new space into the old one.
    pub backward: Backward,
    /// From old embeddings onto mapped new ones, `[d_old, d_new]`.
    pub forward: Dense,
}

/// Map from the new space into the old one.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // there is one
pub enum Backward {
    /// Weight and bias.
    Affine(Dense),
    /// A rotation, which keeps lengths and distances.
    Rotation(Rotation),
}

/// Kind of the map from the new space into the old one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackwardKind {
    /// Weight and bias, kept near orthogonality by a penalty.
    #[default]
    Affine,
    /// A rotation.
    Rotation,
}

/// `h Q^T` with `Q = exp(U - U^T)` for a strictly upper triangular `U`.
#[derive(Module, Debug)]
pub struct Rotation {
    /// Entries of `U`, row by row, `[width (width - 1) / 2]`; zeros are the identity.
    pub upper: Param<Tensor<1>>,
    #[module(skip)]
    width: usize,
}

impl AlignmentMaps {
    /// Maps that begin as the identity on the coordinates that both spaces have, with gradients.
    pub fn new(kind: BackwardKind, [d_old, d_new]: [usize; 2], device: &Device) -> Self {
        let device = &device.clone().autodiff();
        let affine = |rows: usize, columns: usize| {
            let unit: Vec<f32> =
                (0..rows * columns).map(|place| f32::from(place / columns == place % columns)).collect();
            let weight = Tensor::from_data(TensorData::new(unit, [rows, columns]), device);
            Dense::from_parts(weight, Some(Tensor::zeros([columns], device)))
        };
        Self {
            backward: match kind {
                BackwardKind::Affine => Backward::Affine(affine(d_new, d_new)),
                BackwardKind::Rotation => {
                    let count = d_new * d_new.saturating_sub(1) / 2;
                    Backward::Rotation(Rotation::from_upper(Tensor::zeros([count], device), d_new))
                }
            },
            forward: affine(d_old, d_new),
        }
    }

    /// New embeddings in the old space.
    pub fn new_in_old(&self, new: Tensor<2>) -> Tensor<2> {
        match &self.backward {
            Backward::Affine(map) => map.forward(new),
            Backward::Rotation(map) => map.forward(new),
        }
    }

    /// Old embeddings where the mapped new ones are.
    pub fn old_in_new(&self, old: Tensor<2>) -> Tensor<2> {
        self.forward.forward(old)
    }
}

impl Rotation {
    /// Rotation of the given entries.
    ///
    /// # Panics
    /// When there are not `width (width - 1) / 2` entries.
    pub fn from_upper(upper: Tensor<1>, width: usize) -> Self {
        assert_eq!(
            upper.dims()[0],
            width * width.saturating_sub(1) / 2,
            "entries of a strict upper triangle of {width} rows"
        );
        Self { upper: Param::from_tensor(upper), width }
    }

    /// The skew-symmetric matrix `U - U^T`.
    pub fn skew(&self) -> Tensor<2> {
        let n = self.width;
        // Places of the entries, and one more for the zeros below.
        let zero = self.upper.dims()[0];
        let place = |row: usize, column: usize| row * n - row * (row + 1) / 2 + column - row - 1;
        let places: Vec<i32> = (0..n * n)
            .map(|at| (at / n, at % n))
            .map(|(row, column)| if row < column { place(row, column) } else { zero } as i32)
            .collect();
        let upper = self.upper.val();
        let padded = Tensor::cat(vec![upper.clone(), Tensor::zeros([1], &upper.device())], 0);
        let places = Tensor::from_data(TensorData::new(places, [n * n]), &upper.device());
        let u: Tensor<2> = padded.select(0, places).reshape([n, n]);
        u.clone() - u.transpose()
    }

    /// `Q`, orthogonal with determinant 1.
    pub fn matrix(&self) -> Tensor<2> {
        exponential(self.skew())
    }

    /// Rotates the rows of `h [items, width]`.
    pub fn forward(&self, h: Tensor<2>) -> Tensor<2> {
        h.matmul(self.matrix().transpose())
    }
}

/// Terms of the series of the exponential; with a norm of at most a half the next one is below 1e-16.
const TERMS: usize = 12;

/// Matrix exponential by scaling and squaring.
fn exponential(matrix: Tensor<2>) -> Tensor<2> {
    let n = matrix.dims()[0];
    let unit = Tensor::<2>::eye(n, &matrix.device());
    let norm = matrix.clone().detach().square().sum().sqrt().into_scalar::<f32>();
    let halvings = if norm > 0.5 { (norm / 0.5).log2().ceil() as i32 } else { 0 };
    let small = matrix.mul_scalar(0.5f64.powi(halvings));
    let mut sum = unit.clone();
    for term in (1..=TERMS).rev() {
        sum = unit.clone() + small.clone().matmul(sum).div_scalar(term as f64);
    }
    (0..halvings).fold(sum, |root, _| root.clone().matmul(root))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_kernels::host::values as host;

    fn rotation(scale: f32) -> Rotation {
        let upper: Vec<f32> = (0..15).map(|place| scale * ((place * 7 % 11) as f32 - 5.0)).collect();
        Rotation::from_upper(Tensor::from_data(upper.as_slice(), &Device::default()), 6)
    }

    fn largest(matrix: Tensor<2>) -> f32 {
        host(matrix).iter().fold(0.0, |most, value| most.max(value.abs()))
    }

    #[test]
    fn rotations_keep_lengths_and_begin_as_the_identity() {
        for scale in [0.0, 0.01, 0.3, 2.0] {
            let q = rotation(scale).matrix();
            let unit = Tensor::eye(6, &q.device());
            assert!(largest(q.clone().matmul(q.clone().transpose()) - unit.clone()) < 2e-5, "{scale}");
            assert!(scale > 0.0 || largest(q - unit) == 0.0);
        }
        // Two coordinates turn by the angle of their entry.
        let quarter = Tensor::from_data([std::f32::consts::FRAC_PI_2], &Device::default());
        let q = host(Rotation::from_upper(quarter, 2).matrix());
        assert!([0.0, 1.0, -1.0, 0.0].iter().zip(&q).all(|(a, b)| (a - b).abs() < 1e-6), "{q:?}");
    }

    #[test]
    fn maps_begin_as_the_identity_on_common_coordinates() {
        let device = Device::default();
        for kind in [BackwardKind::Affine, BackwardKind::Rotation] {
            let maps = AlignmentMaps::new(kind, [2, 3], &device);
            let new = Tensor::<2>::from_data([[1.0, 2.0, 3.0]], &device.clone().autodiff());
            assert_eq!(host(maps.new_in_old(new)), [1.0, 2.0, 3.0]);
            let old = Tensor::<2>::from_data([[4.0, 5.0]], &device.clone().autodiff());
            assert_eq!(host(maps.old_in_new(old)), [4.0, 5.0, 0.0]);
        }
    }
}
