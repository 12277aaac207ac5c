//! Orthogonal matrices that everyone can regenerate from a seed and a width.

use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_kernels::random::{generator, key_of, normal};
use lowrank_optim::orthonormal_factor;
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Bases by seed and width.
type Made = BTreeMap<(u64, usize), Arc<Vec<f32>>>;

/// Construction of the shared basis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BasisKind {
    /// `qr` for layers of up to 4096 inputs, `dct` for wider ones.
    #[default]
    Auto,
    /// Orthogonal factor of a random matrix, as in the paper; costs d_in^3 once for each width.
    Qr,
    /// Cosines with random signs; a row costs d_in.
    Dct,
    /// Independent normal rows of each adapter, orthogonal only in expectation; the paper's weaker alternative.
    Gaussian,
}

/// Width up to which `auto` is `qr`.
const WIDE: usize = 4096;

impl BasisKind {
    /// The construction for a width.
    pub fn of(self, d_in: usize) -> Self {
        match self {
            Self::Auto if d_in <= WIDE => Self::Qr,
            Self::Auto => Self::Dct,
            kind => kind,
        }
    }

    /// Name by which bases of a construction and seed are compared.
    pub fn named(self, seed: u64) -> String {
        let kind = match self {
            Self::Auto => "auto",
            Self::Qr => "qr",
            Self::Dct => "dct",
            Self::Gaussian => "gaussian",
        };
        format!("{kind} of basis_seed {seed}")
    }
}

/// Rows of the orthogonal matrix of a width: the vectors that adapters choose from.
#[derive(Clone, Debug)]
pub enum Basis {
    /// All vectors, one row each, `[d_in, d_in]`.
    Dense {
        /// Width.
        d_in: usize,
        /// Row-major vectors.
        rows: Arc<Vec<f32>>,
    },
    /// Signs of the inputs; vectors follow from their number.
    Cosines {
        /// Signs, 1 or -1.
        signs: Vec<f64>,
    },
}

impl Basis {
    /// The basis of a construction (`qr` or `dct`), seed and width.
    pub fn seeded(kind: BasisKind, seed: u64, d_in: usize) -> Self {
        if kind.of(d_in) == BasisKind::Dct {
            let mut random = generator(seed, key_of("orthogonal.dct"), d_in as u64);
            return Self::cosines((0..d_in).map(|_| if random.random::<bool>() { 1.0 } else { -1.0 }).collect());
        }
        /// Bases of this process by seed and width: a layer of the same width needs the same one.
        static MADE: LazyLock<Mutex<Made>> = LazyLock::new(Mutex::default);
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = made.entry((seed, d_in)).or_insert_with(|| {
            let gaussian = normal(&mut generator(seed, key_of("orthogonal.qr"), d_in as u64), d_in * d_in);
            Arc::new(rows_of(gaussian, d_in))
        });
        Self::Dense { d_in, rows: rows.clone() }
    }

    /// The orthogonal factor of a row-major matrix `[d_in, d_in]`, its triangle with a positive diagonal; its columns are the vectors.
    pub fn orthogonalised(gaussian: Vec<f32>, d_in: usize) -> Self {
        Self::Dense { d_in, rows: Arc::new(rows_of(gaussian, d_in)) }
    }

    /// Cosines with these signs.
    pub fn cosines(signs: Vec<f64>) -> Self {
        Self::Cosines { signs }
    }

    /// Width, and number of vectors.
    pub fn width(&self) -> usize {
        match self {
            Self::Dense { d_in, .. } => *d_in,
            Self::Cosines { signs } => signs.len(),
        }
    }

    /// Vector of this number.
    pub fn row(&self, number: usize) -> Vec<f32> {
        match self {
            Self::Dense { d_in, rows } => rows[number * d_in..(number + 1) * d_in].to_vec(),
            Self::Cosines { signs } => {
                let width = signs.len();
                let scale = (if number == 0 { 1.0 } else { 2.0 } / width as f64).sqrt();
                // The angle as a whole number of parts of a circle, so that no digits are lost for wide layers.
                let angle = |j: usize| PI * ((2 * j + 1) * number % (4 * width)) as f64 / (2 * width) as f64;
                signs.iter().enumerate().map(|(j, sign)| (scale * angle(j).cos() * sign) as f32).collect()
            }
        }
    }

    /// Number of the vector that a row equals within 1e-5, if it is one of the basis.
    pub fn find(&self, row: &[f64]) -> Option<usize> {
        let near = |number: usize| self.row(number).iter().zip(row).all(|(x, y)| (f64::from(*x) - y).abs() <= 1e-5);
        let dot = |number: usize| self.row(number).iter().zip(row).map(|(x, y)| f64::from(*x) * y).sum::<f64>();
        (0..self.width()).find(|number| dot(*number) > 0.99 && near(*number))
    }
}

fn rows_of(gaussian: Vec<f32>, d_in: usize) -> Vec<f32> {
    let matrix = Tensor::<2>::from_data(TensorData::new(gaussian, [d_in, d_in]), &Device::default());
    host(orthonormal_factor(&matrix).transpose())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_orthonormal_found_again_and_the_same_each_time() {
        for (kind, width) in [(BasisKind::Qr, 24), (BasisKind::Dct, 24), (BasisKind::Dct, 5), (BasisKind::Qr, 1)] {
            let basis = Basis::seeded(kind, 7, width);
            let rows: Vec<Vec<f32>> = (0..width).map(|number| basis.row(number)).collect();
            for (i, x) in rows.iter().enumerate() {
                for (j, y) in rows.iter().enumerate() {
                    let dot: f64 = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-6, "{kind:?} {i} {j}: {dot}");
                }
                let wide: Vec<f64> = x.iter().map(|value| f64::from(*value)).collect();
                assert_eq!(basis.find(&wide), Some(i));
                let other: Vec<f64> = wide.iter().map(|value| value + 1e-3).collect();
                assert_eq!(basis.find(&other), None);
            }
            let again = Basis::seeded(kind, 7, width);
            assert!((0..width).all(|number| again.row(number) == rows[number]));
        }
        assert_ne!(Basis::seeded(BasisKind::Qr, 7, 24).row(0), Basis::seeded(BasisKind::Qr, 8, 24).row(0));
        assert_eq!((BasisKind::Auto.of(4096), BasisKind::Auto.of(4097)), (BasisKind::Qr, BasisKind::Dct));
    }
}
