//! Host decompositions in f64: singular directions and orthonormal factors with fixed signs, triangles, inverses.

use burn::tensor::{Tensor, TensorData};
use nalgebra::{DMatrix, DVector, SymmetricEigen};
use rayon::prelude::*;

use thiserror::Error;

use crate::eigen::{dot, leading_eigenvectors};
use crate::host::values;
use crate::vectorised::vectorised;

/// Sweeps after which an eigenvalue iteration stops without result; it needs a few for each value.
const SWEEPS: usize = 100;

/// Reason why a matrix has no leading directions.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DirectionsError {
    /// Some element is infinite or NaN.
    #[error("the matrix has elements that are not finite")]
    NotFinite,
    /// All elements are zero.
    #[error("the matrix is zero")]
    Zero,
    /// The eigenvalue iteration did not converge.
    #[error("the eigenvalues of the matrix did not converge")]
    NotConverged,
}

/// The `rank` leading right (`[columns, rank]`) or left (`[rows, rank]`) singular directions of a matrix.
///
/// They are eigenvectors of the smaller product of the matrix with itself, in f64: exact for f32 input down to singular values of 1e-8 of the
/// largest. The entry of greatest magnitude of each direction is positive, of equal ones the first.
pub fn leading_directions(matrix: &Tensor<2>, rank: usize, right: bool) -> Result<Tensor<2>, DirectionsError> {
    let device = matrix.device();
    let [rows, columns] = matrix.dims();
    let side = if right { columns } else { rows };
    Ok(tensor(&directions(host(matrix), rank, right)?, [side, rank], &device))
}

/// The `rank` leading singular values of a matrix with their directions; see [`thin_svd`].
#[derive(Clone, Debug)]
pub struct ThinSvd {
    /// Left directions `[rows, rank]`.
    pub left: Tensor<2>,
    /// Singular values, descending.
    pub values: Vec<f64>,
    /// Right directions `[columns, rank]`.
    pub right: Tensor<2>,
}

/// Singular values down to this share of the largest have directions that come out orthogonal from the product with those of the other side.
const STRONG: f64 = 1e-2;

/// The leading part of a singular value decomposition, in f64, on the host. The entry of greatest magnitude of each left direction is positive;
/// directions with singular value 0 are completed to an orthonormal set, as are all if there are no leading ones. The rank is at most the
/// smaller side.
pub fn thin_svd(matrix: &Tensor<2>, rank: usize) -> ThinSvd {
    let device = matrix.device();
    let [rows, columns] = matrix.dims();
    let g = host(matrix);
    // Those of the shorter side first: eigenvectors of the smaller product, orthonormal as they come.
    let right_first = columns < rows;
    let near = directions(g.clone(), rank, right_first).unwrap_or_else(|_| DMatrix::identity(rows.min(columns), rank));
    let far = if right_first { g * &near } else { g.transpose() * &near };
    let singular: Vec<f64> = far.column_iter().map(|column| column.norm()).collect();
    let strong = singular.iter().take_while(|value| **value > STRONG * singular[0]).count();
    let far = orthonormal(far, strong);
    let (mut left, mut right) = if right_first { (far, near) } else { (near, far) };
    for (mut left, mut right) in left.column_iter_mut().zip(right.column_iter_mut()) {
        if points_down(left.as_slice()) {
            left.neg_mut();
            right.neg_mut();
        }
    }
    ThinSvd {
        left: tensor(&left, [rows, rank], &device),
        values: singular,
        right: tensor(&right, [columns, rank], &device),
    }
}

/// A matrix as lower times diagonal times upper triangle with its rows in another order; see [`pivoted_lu`].
#[derive(Clone, Debug)]
pub struct PivotedLu {
    /// Row `permutation[i]` of the matrix is row `i` of the product.
    pub permutation: Vec<usize>,
    /// Lower triangle `[rows, k]` with ones on the diagonal and nothing larger below, `k` the smaller side.
    pub lower: Tensor<2>,
    /// The `k` pivots.
    pub diagonal: Vec<f64>,
    /// Upper triangle `[k, columns]` with ones on the diagonal.
    pub upper: Tensor<2>,
}

/// Pivots of at most this share of the largest divide nothing.
const TINY: f64 = 1e-6;

/// LU factors with row pivoting, in f64, on the host. A pivot that is too small to divide by counts as 1, and its row of `upper` stays undivided:
/// the product is the matrix for singular ones too.
pub fn pivoted_lu(matrix: &Tensor<2>) -> PivotedLu {
    let device = matrix.device();
    let [rows, columns] = matrix.dims();
    let side = rows.min(columns);
    let lu = host(matrix).lu();
    let mut order = DVector::from_iterator(rows, 0..rows);
    lu.p().permute_rows(&mut order);
    let (lower, mut upper) = (lu.l(), lu.u());
    let mut diagonal: Vec<f64> = (0..side).map(|place| upper[(place, place)]).collect();
    let largest = diagonal.iter().fold(0.0, |largest: f64, pivot| largest.max(pivot.abs()));
    for (pivot, mut row) in diagonal.iter_mut().zip(upper.row_iter_mut()) {
        if pivot.abs() > TINY * largest {
            row /= *pivot;
        } else {
            *pivot = 1.0;
        }
    }
    PivotedLu {
        permutation: order.iter().copied().collect(),
        lower: tensor(&lower, [rows, side], &device),
        diagonal,
        upper: tensor(&upper, [side, columns], &device),
    }
}

/// The inverse of a square matrix, computed in f64; none if a product with it would lose more than f32 has digits.
pub fn inverse(matrix: &Tensor<2>) -> Option<Tensor<2>> {
    let dense = host(matrix);
    let inverse = dense.clone().try_inverse()?;
    let condition = dense.norm() * inverse.norm();
    (condition < f32::EPSILON.recip().into()).then(|| tensor(&inverse, matrix.dims(), &matrix.device()))
}

fn host(matrix: &Tensor<2>) -> DMatrix<f64> {
    let [rows, columns] = matrix.dims();
    DMatrix::from_row_slice(rows, columns, &values(matrix.clone())).map(f64::from)
}

fn directions(g: DMatrix<f64>, rank: usize, right: bool) -> Result<DMatrix<f64>, DirectionsError> {
    let (rows, columns) = g.shape();
    let side = if right { columns } else { rows };
    let largest = largest_magnitude(&g)?;
    let g = g / largest;
    // The product on the longer side would have eigenvalues that are zero but for rounding.
    let thin = side <= rows.min(columns);
    let gram = if right == thin { gram(&g) } else { gram(&g.transpose()) };
    let mut found = eigenvectors(gram, rank)?;
    if !thin {
        // From the directions of the other side; those with singular value 0 are completed.
        found = if right { g.transpose() * found } else { &g * found };
        found = orthonormal(found.resize_horizontally(rank, 0.0), 0);
    }
    turn_up(&mut found);
    Ok(found)
}

/// The `rank` leading right directions of a matrix that has no fewer rows than columns, as [`leading_directions`] finds them, without a copy of it.
pub fn right_directions(matrix: &DMatrix<f64>, rank: usize) -> Result<DMatrix<f64>, DirectionsError> {
    largest_magnitude(matrix)?;
    let mut found = eigenvectors(gram(matrix), rank)?;
    turn_up(&mut found);
    Ok(found)
}

/// Largest magnitude of a matrix that has directions.
fn largest_magnitude(g: &DMatrix<f64>) -> Result<f64, DirectionsError> {
    if !g.iter().all(|element| element.is_finite()) {
        return Err(DirectionsError::NotFinite);
    }
    match g.amax() {
        0.0 => Err(DirectionsError::Zero),
        largest => Ok(largest),
    }
}

/// The leading eigenvectors of a Gram matrix, at most as many as it has.
fn eigenvectors(gram: DMatrix<f64>, rank: usize) -> Result<DMatrix<f64>, DirectionsError> {
    let n = gram.nrows();
    let rank = rank.min(n);
    match leading_eigenvectors(gram.as_slice().to_vec(), n, rank) {
        Some(vectors) => Ok(DMatrix::from_vec(n, rank, vectors)),
        None => by_rotations(gram, rank),
    }
}

/// Makes the entry of greatest magnitude of each direction positive.
fn turn_up(directions: &mut DMatrix<f64>) {
    for mut column in directions.column_iter_mut() {
        if points_down(column.as_slice()) {
            column.neg_mut();
        }
    }
}

/// Columns of a Gram matrix that are computed together.
const GRAM_COLUMNS: usize = 64;

/// `G^T G`, scaled so that its largest element is 1.
fn gram(g: &DMatrix<f64>) -> DMatrix<f64> {
    let (depth, n) = g.shape();
    let mut gram = vec![0.0; n * n];
    // A fixed partition, as bits must not depend on the number of threads; of each column only what is not below the diagonal.
    gram.par_chunks_mut(GRAM_COLUMNS * n).enumerate().for_each(|(number, part)| {
        let first = number * GRAM_COLUMNS;
        let count = part.len() / n;
        let (ours, all) = (g.as_slice()[first * depth..].as_ptr(), g.as_slice().as_ptr());
        // SAFETY: `first + count` columns of `depth` elements are read, and as many rows of `count` columns of the part written.
        unsafe {
            gemm::gemm(
                first + count,
                count,
                depth,
                part.as_mut_ptr(),
                n as isize,
                1,
                false,
                all,
                1,
                depth as isize,
                ours,
                depth as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    });
    let mut gram = DMatrix::from_vec(n, n, gram);
    gram.fill_lower_triangle_with_upper_triangle();
    // The largest element of such a matrix is on its diagonal.
    let largest = gram.diagonal().amax();
    gram / largest
}

/// Computes leading eigenvectors by a slower method that is expected to converge for all finite matrices.
fn by_rotations(gram: DMatrix<f64>, rank: usize) -> Result<DMatrix<f64>, DirectionsError> {
    let (n, sweeps) = (gram.nrows(), SWEEPS * gram.nrows().max(32));
    let eigen = SymmetricEigen::try_new(gram, f64::EPSILON, sweeps).ok_or(DirectionsError::NotConverged)?;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]).then(a.cmp(b)));
    let leading: Vec<_> = order.into_iter().take(rank).map(|index| eigen.eigenvectors.column(index)).collect();
    Ok(DMatrix::from_columns(&leading))
}

/// Reports whether the entry of greatest magnitude is negative, of equal ones the first.
fn points_down(column: &[f64]) -> bool {
    let mut top = 0;
    for (index, value) in column.iter().enumerate() {
        // Values that differ by rounding count as equal.
        if value.abs() > column[top].abs() * (1.0 + 1e-9) {
            top = index;
        }
    }
    column[top] < 0.0
}

/// The orthonormal factor of a thin QR decomposition whose other factor has a positive diagonal, `[n, r]` for `[n, r]`. Dependent columns are
/// replaced by unit vectors orthogonal to the others; values that are not finite give the first unit vectors.
pub fn orthonormal_factor(matrix: &Tensor<2>) -> Tensor<2> {
    let (shape, device) = (matrix.dims(), matrix.device());
    tensor(&orthonormal(host(matrix), 0), shape, &device)
}

/// Gram-Schmidt, each column twice, which is enough for orthogonality to working precision. Of the first `orthogonal` columns only the lengths
/// change.
fn orthonormal(mut y: DMatrix<f64>, orthogonal: usize) -> DMatrix<f64> {
    let (n, r) = y.shape();
    if y.iter().any(|value| !value.is_finite()) {
        return DMatrix::identity(n, r);
    }
    let largest = y.column_iter().map(|column| column.norm()).fold(0.0, f64::max);
    for mut column in y.column_iter_mut().take(orthogonal) {
        column.normalize_mut();
    }
    let mut unit = 0;
    for j in orthogonal..r {
        let size = y.column(j).norm();
        reduce(&mut y, j);
        let mut rest = y.column(j).norm();
        // Less than rounding leaves no direction; so small a remainder is rounding noise.
        while rest <= 1e-12 * largest || rest <= 1e-14 * size || rest == 0.0 {
            y.column_mut(j).fill(0.0);
            y[(unit % n, j)] = 1.0;
            unit += 1;
            reduce(&mut y, j);
            rest = y.column(j).norm();
            if rest < 1e-6 {
                rest = 0.0;
                continue;
            }
            break;
        }
        y.column_mut(j).scale_mut(rest.recip());
        reduce(&mut y, j);
        let norm = y.column(j).norm();
        y.column_mut(j).scale_mut(norm.recip());
    }
    y
}

/// Subtracts the components along the columns before `j` from column `j`.
fn reduce(y: &mut DMatrix<f64>, j: usize) {
    let n = y.nrows();
    let (before, rest) = y.as_mut_slice().split_at_mut(j * n);
    let column = &mut rest[..n];
    vectorised(
        #[inline(always)]
        || {
            for other in before.chunks_exact(n) {
                let along = dot(other, column);
                column.iter_mut().zip(other).for_each(|(value, other)| *value -= along * other);
            }
        },
    );
}

fn tensor(matrix: &DMatrix<f64>, shape: [usize; 2], device: &burn::tensor::Device) -> Tensor<2> {
    let values: Vec<f32> = matrix.transpose().iter().map(|value| *value as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
mod tests;
