//! A layer of a pool: the vectors of all sources at each position, in a basis of their own.

use super::algebra::Svd;
use super::source::{Matrix, Source};

/// Mean, directions and coefficients at the positions of one factor: one position is a row of B or a column of A.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// Means `[r, positions]`.
    pub mean: Matrix,
    /// Orthonormal directions of each position, `[r p, positions]`: direction by direction.
    pub basis: Matrix,
    /// Coefficients of each position, `[p n, positions]`: source by source.
    pub coefficients: Matrix,
    /// Singular values of each position, descending; empty when read from a file.
    pub values: Vec<Vec<f64>>,
}

/// One layer of a pool.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolLayer {
    /// Positions of the rows of B.
    pub b: Side,
    /// Positions of the columns of A.
    pub a: Side,
    /// Scales of the sources.
    pub scales: Vec<f64>,
}

impl Side {
    /// Merges the vectors `x_i [r, positions]` of all sources at each position.
    pub(super) fn of(sources: &[Matrix], center: bool) -> Self {
        let (rank, positions) = sources[0].shape();
        let count = sources.len();
        let most = rank.min(count);
        let mut mean = Matrix::zeros(rank, positions);
        if center {
            sources.iter().for_each(|source| mean += source);
            mean /= count as f64;
        }
        let mut basis = Matrix::zeros(rank * most, positions);
        let mut coefficients = Matrix::zeros(most * count, positions);
        let mut values = Vec::with_capacity(positions);
        let mut x = Matrix::zeros(rank, count);
        for position in 0..positions {
            for (i, source) in sources.iter().enumerate() {
                x.set_column(i, &(source.column(position) - mean.column(position)));
            }
            let svd = Svd::of(&x);
            basis.column_mut(position).as_mut_slice().copy_from_slice(svd.u.as_slice());
            let own = svd.u.transpose() * &x;
            coefficients.column_mut(position).as_mut_slice().copy_from_slice(own.as_slice());
            values.push(svd.values);
        }
        Self { mean, basis, coefficients, values }
    }

    /// Number of directions.
    pub fn directions(&self) -> usize {
        self.basis.nrows().checked_div(self.mean.nrows()).unwrap_or(0)
    }

    /// Keeps the first `p` directions.
    pub(super) fn truncate(&mut self, p: usize) {
        let (rank, before) = (self.mean.nrows(), self.directions());
        let count = self.coefficients.nrows().checked_div(before).unwrap_or(0);
        self.basis = self.basis.rows(0, rank * p).into_owned();
        let kept: Vec<usize> = (0..count).flat_map(|i| (0..p).map(move |k| i * before + k)).collect();
        self.coefficients = self.coefficients.select_rows(&kept);
    }

    /// Squared deviations that directions from `p` on hold, at each position.
    pub fn residuals(&self, p: usize) -> Vec<f64> {
        self.values.iter().map(|values| values.iter().skip(p).map(|value| value * value).sum()).collect()
    }

    /// Vectors `[r, positions]` of source `i`.
    fn rebuilt(&self, i: usize) -> Matrix {
        let (rank, p) = (self.mean.nrows(), self.directions());
        let mut x = self.mean.clone();
        for position in 0..x.ncols() {
            for k in 0..p {
                let coefficient = self.coefficients[(i * p + k, position)];
                let directions = self.basis.column(position);
                x.column_mut(position).axpy(coefficient, &directions.rows(k * rank, rank), 1.0);
            }
        }
        x
    }

    /// Adds a source without changing mean and directions; returns its squared residual and its squared deviation from the mean.
    fn add(&mut self, x: &Matrix) -> [f64; 2] {
        let (rank, p) = (self.mean.nrows(), self.directions());
        let deviation = x - &self.mean;
        let mut all = self.coefficients.clone().resize_vertically(self.coefficients.nrows() + p, 0.0);
        let mut kept = 0.0;
        for position in 0..x.ncols() {
            for k in 0..p {
                let directions = self.basis.column(position);
                let coefficient = directions.rows(k * rank, rank).dot(&deviation.column(position));
                let place = self.coefficients.nrows() + k;
                all[(place, position)] = coefficient;
                kept += coefficient * coefficient;
            }
        }
        self.coefficients = all;
        let squared = deviation.norm_squared();
        [(squared - kept).max(0.0), squared]
    }
}

impl PoolLayer {
    /// Number of sources.
    pub fn sources(&self) -> usize {
        self.scales.len()
    }

    /// Directions at each position.
    pub fn directions(&self) -> usize {
        self.b.directions()
    }

    /// Number of stored values.
    pub fn values(&self) -> usize {
        let side = |side: &Side| side.mean.len() + side.basis.len() + side.coefficients.len();
        side(&self.a) + side(&self.b) + self.scales.len()
    }

    /// The source of this number: factors `A [r, d_in]` and `B [d_out, r]` and its scale.
    pub fn revert(&self, source: usize) -> (Matrix, Matrix, f64) {
        (self.a.rebuilt(source), self.b.rebuilt(source).transpose(), self.scales[source])
    }

    /// Adds a source without changing mean and directions; returns the share of its deviation from the mean that is lost.
    pub fn add(&mut self, source: &Source) -> Result<f64, String> {
        let (rank, d_in, d_out) = (self.a.mean.nrows(), self.a.mean.ncols(), self.b.mean.ncols());
        if source.a.shape() != (rank, d_in) || source.b.shape() != (d_out, rank) {
            return Err(format!(
                "has A {:?} and B {:?}; the pool has rank {rank}, {d_in} inputs and {d_out} outputs",
                source.a.shape(),
                source.b.shape()
            ));
        }
        let ([lost_a, all_a], [lost_b, all_b]) = (self.a.add(&source.a), self.b.add(&source.b.transpose()));
        self.scales.push(source.scale);
        Ok(share(lost_a + lost_b, all_a + all_b))
    }
}

/// Root of a ratio of squares.
pub(super) fn share(part: f64, all: f64) -> f64 {
    if all > 0.0 { (part / all).sqrt() } else { 0.0 }
}
