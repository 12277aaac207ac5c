//! Host decompositions in f64: singular directions and orthonormal factors with fixed signs, triangles, inverses.

use burn::tensor::{Tensor, TensorData};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

use crate::host::values;
use crate::vectorised::vectorised;

/// Sweeps after which an eigenvalue iteration gives up; it needs a few for each value.
const SWEEPS: usize = 100;

/// The `rank` leading right (`[columns, rank]`) or left (`[rows, rank]`) singular directions of a matrix.
///
/// They are eigenvectors of the smaller product of the matrix with itself, in f64: exact for f32 input down to singular values of 1e-8 of the
/// largest. The entry of greatest magnitude of each direction is positive, of equal ones the first.
pub fn leading_directions(matrix: &Tensor<2>, rank: usize, right: bool) -> Tensor<2> {
    let device = matrix.device();
    let [rows, columns] = matrix.dims();
    let side = if right { columns } else { rows };
    let directions = directions(host(matrix), rank, right);
    tensor(&directions, [side, rank], &device)
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
/// directions without energy are filled up to orthonormal ones. The rank is at most the smaller side.
pub fn thin_svd(matrix: &Tensor<2>, rank: usize) -> ThinSvd {
    let device = matrix.device();
    let [rows, columns] = matrix.dims();
    let g = host(matrix);
    // Those of the shorter side first: eigenvectors of the smaller product, orthonormal as they come.
    let right_first = columns < rows;
    let near = directions(g.clone(), rank, right_first);
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

fn directions(g: DMatrix<f64>, rank: usize, right: bool) -> DMatrix<f64> {
    let (rows, columns) = g.shape();
    let side = if right { columns } else { rows };
    let largest = g.amax();
    if !largest.is_finite() || largest == 0.0 {
        return DMatrix::identity(side, rank);
    }
    let g = g / largest;
    // The product on the longer side would have eigenvalues that are zero but for rounding.
    let thin = side <= rows.min(columns);
    let gram = if right == thin { g.transpose() * &g } else { &g * g.transpose() };
    let Some(eigen) = SymmetricEigen::try_new(gram, f64::EPSILON, SWEEPS * side.max(32)) else {
        return DMatrix::identity(side, rank);
    };
    let mut order: Vec<usize> = (0..eigen.eigenvalues.len()).collect();
    order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]).then(a.cmp(b)));
    let mut found = DMatrix::zeros(eigen.eigenvectors.nrows(), rank.min(order.len()));
    for (place, index) in order.into_iter().take(rank).enumerate() {
        found.set_column(place, &eigen.eigenvectors.column(index));
    }
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
    found
}

/// Whether the entry of greatest magnitude is negative, of equal ones the first.
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

/// The sum of products, in 16 parts.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut parts = [0.0; 16];
    let ((a, rest_of_a), (b, rest_of_b)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        parts.iter_mut().zip(a).zip(b).for_each(|((part, a), b)| *part += a * b);
    }
    let rest: f64 = rest_of_a.iter().zip(rest_of_b).map(|(a, b)| a * b).sum();
    parts.iter().sum::<f64>() + rest
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
            let p = leading_directions(&g, 4, right);
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
            assert!(deviation_from_orthonormal(&leading_directions(&y, 3, true)) < 1e-5);
            assert!(deviation_from_orthonormal(&leading_directions(&y, 5, false)) < 1e-5);
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
