//! Host decompositions in f64: singular directions and orthonormal factors with fixed signs, triangles, inverses.

use burn::tensor::{Tensor, TensorData};
use nalgebra::{DMatrix, DVector, SymmetricEigen};
use rayon::prelude::*;

use thiserror::Error;

use crate::eigen::{dot, leading_eigenvectors};
use crate::host::values;
use crate::vectorised::vectorised;

/// Sweeps after which an eigenvalue iteration gives up; it needs a few for each value.
const SWEEPS: usize = 100;

/// Why a matrix has no leading directions.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DirectionsError {
    /// Some element is infinite or NaN.
    #[error("the matrix has elements that are not finite")]
    NotFinite,
    /// All elements are zero.
    #[error("the matrix is zero")]
    Zero,
    /// The eigenvalue iteration gave up.
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
    /// Singular values, falling.
    pub values: Vec<f64>,
    /// Right directions `[columns, rank]`.
    pub right: Tensor<2>,
}

/// Singular values down to this share of the largest have directions that come out orthogonal from the product with those of the other side.
const STRONG: f64 = 1e-2;

/// The leading part of a singular value decomposition, in f64, on the host. The entry of greatest magnitude of each left direction is positive;
/// directions without energy are filled up to orthonormal ones, as are all where there are no leading ones. The rank is at most the smaller side.
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

/// The inverse of a square matrix, worked out in f64; none where a product with it would lose more than f32 has digits.
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
    if !g.iter().all(|element| element.is_finite()) {
        return Err(DirectionsError::NotFinite);
    }
    let largest = g.amax();
    if largest == 0.0 {
        return Err(DirectionsError::Zero);
    }
    let g = g / largest;
    // The product on the longer side would have eigenvalues that are zero but for rounding.
    let thin = side <= rows.min(columns);
    let gram = gram(&if right == thin { g.clone() } else { g.transpose() });
    let n = gram.nrows();
    let mut found = match leading_eigenvectors(gram.as_slice().to_vec(), n, rank.min(n)) {
        Some(vectors) => DMatrix::from_vec(n, rank.min(n), vectors),
        None => by_rotations(gram, rank.min(n))?,
    };
    if !thin {
        // From the directions of the other side; those without energy are filled up.
        found = if right { g.transpose() * found } else { &g * found };
        found = orthonormal(found.resize_horizontally(rank, 0.0), 0);
    }
    for mut column in found.column_iter_mut() {
        if points_down(column.as_slice()) {
            column.neg_mut();
        }
    }
    Ok(found)
}

/// Columns of a Gram matrix that are made together.
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
    // The largest element of such a matrix stands on its diagonal.
    let largest = gram.diagonal().amax();
    gram / largest
}

/// Leading eigenvectors the slow way, which always converges for finite matrices as far as is known.
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
/// replaced by unit vectors orthogonal to the rest; values that are not finite give the first unit vectors.
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
        // Less than rounding leaves no direction; so small a rest is noise of the subtraction.
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

/// Takes the parts along the columns before `j` out of column `j`.
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
mod tests {
    use super::*;
    use burn::tensor::{Device, Int};

    fn matrix(rows: usize, columns: usize) -> Tensor<2> {
        let values: Vec<f32> = (0..rows * columns).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
        Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::default())
    }

    fn deviation_from_orthonormal(p: &Tensor<2>) -> f32 {
        let r = p.dims()[1];
        let gram = p.clone().transpose().matmul(p.clone());
        (gram - Tensor::eye(r, &p.device())).abs().max().into_scalar()
    }

    #[test]
    fn directions_are_orthonormal_and_keep_the_most_energy() {
        for (rows, columns, right) in [(12, 8, true), (8, 12, true), (12, 8, false), (8, 12, false), (9, 9, true)] {
            let g = matrix(rows, columns);
            let p = leading_directions(&g, 4, right).unwrap();
            assert!(deviation_from_orthonormal(&p) < 1e-5);
            let kept = |p: &Tensor<2>| -> f32 {
                let low = if right { g.clone().matmul(p.clone()) } else { p.clone().transpose().matmul(g.clone()) };
                low.square().sum().into_scalar()
            };
            let best = kept(&p);
            for seed in 0..20 {
                let side = if right { columns } else { rows };
                let other = orthonormal_factor(&matrix(side, 4 + seed).narrow(1, seed, 4));
                assert!(kept(&other) <= best * 1.00001);
            }
            let values = values(p.clone());
            for column in 0..4 {
                let column: Vec<f32> = values.iter().skip(column).step_by(4).copied().collect();
                let top = column.iter().fold(0f32, |top, value| if value.abs() > top.abs() { *value } else { top });
                assert!(top > 0.0);
            }
        }
    }

    #[test]
    fn directions_are_those_of_rotations() {
        let falling = |rows, columns| {
            let sizes: Vec<f32> = (0..columns).map(|i| (-0.3 * i as f32).exp()).collect();
            matrix(rows, columns)
                * Tensor::<1>::from_data(TensorData::new(sizes, [columns]), &Device::default()).unsqueeze()
        };
        for g in [matrix(90, 70), falling(60, 60), falling(100, 33)] {
            let gram = host(&g).transpose() * host(&g);
            let gram = &gram / gram.amax();
            let expected = by_rotations(gram.clone(), 16).unwrap();
            let ours = leading_eigenvectors(gram.as_slice().to_vec(), gram.nrows(), 16).unwrap();
            for (ours, expected) in ours.chunks_exact(gram.nrows()).zip(expected.column_iter()) {
                assert!((dot(ours, expected.as_slice()).abs() - 1.0).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn gram_matrices_are_products() {
        for (rows, columns) in [(5, 3), (40, 130), (130, 64)] {
            let g = host(&matrix(rows, columns));
            let expected = g.transpose() * &g;
            assert!((gram(&g) * expected.amax() - &expected).amax() < 1e-12 * expected.amax());
        }
    }

    #[test]
    fn equal_eigenvalues_have_orthonormal_vectors() {
        let mut single = DMatrix::zeros(40, 40);
        single[(3, 3)] = 1.0;
        let low = DMatrix::from_fn(40, 3, |i, j| ((i * i + 7 * j) as f64 * 0.37).sin());
        let low = &low * low.transpose();
        for gram in [DMatrix::identity(40, 40), single, DMatrix::from_element(40, 40, 1.0), &low / low.amax()] {
            let vectors = leading_eigenvectors(gram.as_slice().to_vec(), 40, 40).map(|v| DMatrix::from_vec(40, 40, v));
            let vectors = vectors.unwrap_or_else(|| by_rotations(gram.clone(), 40).unwrap());
            assert!((vectors.transpose() * &vectors - DMatrix::identity(40, 40)).amax() < 1e-11);
            let turned = vectors.transpose() * &gram * &vectors;
            assert!((&turned - DMatrix::from_diagonal(&turned.diagonal())).amax() < 1e-10);
        }
    }

    #[test]
    fn the_decomposition_gives_the_matrix_back() {
        for (rows, columns) in [(12, 8), (8, 12), (9, 9)] {
            let g = matrix(rows, columns);
            let svd = thin_svd(&g, rows.min(columns));
            assert!(svd.values.is_sorted_by(|a, b| a >= b));
            assert!(deviation_from_orthonormal(&svd.left) < 1e-5 && deviation_from_orthonormal(&svd.right) < 1e-5);
            let sizes: Vec<f32> = svd.values.iter().map(|value| *value as f32).collect();
            let sizes = Tensor::<1>::from_data(TensorData::new(sizes, [svd.values.len()]), &Device::default());
            let back = (svd.left * sizes.unsqueeze::<2>()).matmul(svd.right.transpose());
            assert!((back - g).abs().max().into_scalar::<f32>() < 1e-5);
        }
    }

    fn close(a: Tensor<2>, b: Tensor<2>) -> bool {
        (a - b).abs().max().into_scalar::<f32>() < 1e-5
    }

    #[test]
    fn triangles_give_the_matrix_back_also_singular_ones() {
        let rows = |count: usize| matrix(1, 5).repeat_dim(0, count);
        let singular =
            [rows(4), Tensor::zeros([3, 5], &Device::default()), Tensor::cat(vec![rows(2) * 0.0, rows(1)], 0)];
        for g in [matrix(12, 8), matrix(8, 12), matrix(9, 9)].into_iter().chain(singular) {
            let lu = pivoted_lu(&g);
            let pivots: Vec<f32> = lu.diagonal.iter().map(|pivot| *pivot as f32).collect();
            let pivots = Tensor::<1>::from_data(TensorData::new(pivots, [lu.diagonal.len()]), &Device::default());
            let product = (lu.lower.clone() * pivots.unsqueeze::<2>()).matmul(lu.upper);
            let order: Vec<i32> = lu.permutation.iter().map(|row| *row as i32).collect();
            let order = Tensor::<1, Int>::from_data(TensorData::new(order, [g.dims()[0]]), &Device::default());
            assert!(close(product, g.select(0, order)));
            assert!(lu.lower.abs().max().into_scalar::<f32>() <= 1.0);
        }
    }

    #[test]
    fn an_inverse_exists_where_its_digits_do() {
        let square = matrix(6, 6);
        let inverse = inverse(&square).unwrap();
        assert!(close(inverse.matmul(square), Tensor::eye(6, &Device::default())));
        assert!(super::inverse(&matrix(1, 6).repeat_dim(0, 6)).is_none());
        assert!(super::inverse(&(matrix(6, 6) * f32::NAN)).is_none());
    }

    #[test]
    fn zero_dependent_and_infinite_columns_give_orthonormal_ones() {
        let zero = Tensor::<2>::zeros([6, 4], &Device::default());
        let same = matrix(6, 1).repeat_dim(1, 4);
        for y in [zero.clone(), same.clone(), zero.clone() + f32::NAN, same.clone() * 1e-30, same.clone() * 1e30] {
            assert!(deviation_from_orthonormal(&orthonormal_factor(&y)) < 1e-5);
            for directions in [leading_directions(&y, 3, true), leading_directions(&y, 5, false)] {
                match directions {
                    Ok(directions) => assert!(deviation_from_orthonormal(&directions) < 1e-5),
                    Err(DirectionsError::Zero) => assert!(values(y.clone()).iter().all(|element| *element == 0.0)),
                    Err(error) => assert!(error == DirectionsError::NotFinite && values(y.clone())[0].is_nan()),
                }
            }
        }
    }

    #[test]
    fn the_factor_spans_the_columns_with_a_positive_diagonal() {
        let y = matrix(10, 4);
        let q = orthonormal_factor(&y);
        let r = values(q.clone().transpose().matmul(y.clone()));
        for i in 0..4 {
            assert!(r[i * 4 + i] > 0.0);
            assert!((0..i).all(|j| r[i * 4 + j].abs() < 1e-5));
        }
        let back = q.clone().matmul(q.transpose().matmul(y.clone()));
        assert!((back - y).abs().max().into_scalar::<f32>() < 1e-5);
    }
}
