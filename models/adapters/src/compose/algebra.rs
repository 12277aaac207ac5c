//! Decompositions of products of thin factors, in f64 on the host, without the dense product.

use lowrank_kernels::decompose::right_directions;

use super::source::Matrix;

/// Thin singular value decomposition `U S V^T`, values descending.
#[derive(Clone, Debug)]
pub(super) struct Svd {
    /// Left directions `[rows, k]`; a zero column where the value is 0.
    pub u: Matrix,
    /// The `k` values.
    pub values: Vec<f64>,
    /// Right directions `[columns, k]`.
    pub v: Matrix,
}

/// Sweeps after which the rotations stop; they converge quadratically and need about ten.
const SWEEPS: usize = 60;

impl Svd {
    /// Decomposes a small matrix by one-sided Jacobi rotations, which keep the relative accuracy of small values.
    pub fn of(matrix: &Matrix) -> Self {
        let (rows, columns) = matrix.shape();
        if rows < columns {
            let Self { u, values, v } = Self::of(&matrix.transpose());
            return Self { u: v, values, v: u };
        }
        let mut u = matrix.clone();
        let mut v = Matrix::identity(columns, columns);
        for _ in 0..SWEEPS {
            let mut rotated = false;
            for p in 0..columns {
                for q in p + 1..columns {
                    rotated |= rotate(&mut u, &mut v, p, q);
                }
            }
            if !rotated {
                break;
            }
        }
        let norms: Vec<f64> = u.column_iter().map(|column| column.norm()).collect();
        let mut order: Vec<usize> = (0..columns).collect();
        order.sort_by(|a, b| norms[*b].total_cmp(&norms[*a]).then(a.cmp(b)));
        let mut sorted = Matrix::zeros(rows, columns);
        for (place, from) in order.iter().enumerate().filter(|(_, from)| norms[**from] > 0.0) {
            sorted.set_column(place, &(u.column(*from) / norms[*from]));
        }
        Self {
            u: sorted,
            values: order.iter().map(|from| norms[*from]).collect(),
            v: Matrix::from_fn(columns, columns, |row, place| v[(row, order[place])]),
        }
    }

    /// Decomposes `B A` for `B [rows, r]` and `A [r, columns]` from the triangles of both.
    pub fn of_product(b: &Matrix, a: &Matrix) -> Self {
        let (left, right) = (b.clone().qr(), a.transpose().qr());
        let Self { u, values, v } = Self::of(&(left.r() * right.r().transpose()));
        Self { u: left.q() * u, values, v: right.q() * v }
    }

    /// The leading part as `B = U S` and `A = V^T`, each row of A with a positive entry of largest magnitude, and the share
    /// of the norm that is left out.
    pub fn leading(&self, rank: usize) -> (Matrix, Matrix, f64) {
        let kept = rank.min(self.values.len());
        let mut b = Matrix::zeros(self.u.nrows(), kept);
        let mut a = Matrix::zeros(kept, self.v.nrows());
        for k in 0..kept {
            let direction = self.v.column(k);
            let sign = if direction[direction.icamax()] < 0.0 { -1.0 } else { 1.0 };
            b.set_column(k, &(self.u.column(k) * (sign * self.values[k])));
            a.set_row(k, &(direction.transpose() * sign));
        }
        (a, b, share(&self.values, kept))
    }
}

/// Share of the norm in the values from `kept` on.
pub(super) fn share(values: &[f64], kept: usize) -> f64 {
    let squares = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
    let (all, rest) = (squares(values), squares(&values[kept.min(values.len())..]));
    if all > 0.0 { (rest / all).sqrt() } else { 0.0 }
}

/// Makes two columns orthogonal; returns false if they are already.
fn rotate(u: &mut Matrix, v: &mut Matrix, p: usize, q: usize) -> bool {
    let (alpha, beta, gamma) = {
        let (x, y) = (u.column(p), u.column(q));
        (x.norm_squared(), y.norm_squared(), x.dot(&y))
    };
    if gamma == 0.0 || gamma.abs() <= 1e-15 * (alpha * beta).sqrt() {
        return false;
    }
    let zeta = (beta - alpha) / (2.0 * gamma);
    let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
    let cos = (1.0 + t * t).sqrt().recip();
    let sin = cos * t;
    for matrix in [u, v] {
        let rows = matrix.nrows();
        let (before, after) = matrix.as_mut_slice().split_at_mut(q * rows);
        let x = &mut before[p * rows..(p + 1) * rows];
        for (x, y) in x.iter_mut().zip(&mut after[..rows]) {
            (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
        }
    }
    true
}

/// The sources' factors side by side: `A [R, d_in]` of the stacked rows, each times its factor, and `B [d_out, R]`.
pub(super) fn stacked(parts: &[(&Matrix, &Matrix, f64)]) -> (Matrix, Matrix) {
    let rank: usize = parts.iter().map(|(a, ..)| a.nrows()).sum();
    let (d_in, d_out) = parts.first().map_or((0, 0), |(a, b, _)| (a.ncols(), b.nrows()));
    let (mut all_a, mut all_b) = (Matrix::zeros(rank, d_in), Matrix::zeros(d_out, rank));
    let mut at = 0;
    for (a, b, factor) in parts {
        all_a.rows_mut(at, a.nrows()).copy_from(&(*a * *factor));
        all_b.columns_mut(at, a.nrows()).copy_from(b);
        at += a.nrows();
    }
    (all_a, all_b)
}

/// `<B A, B' A'>` of two products, without forming them.
pub(super) fn inner_product([b, a]: [&Matrix; 2], [other_b, other_a]: [&Matrix; 2]) -> f64 {
    (b.transpose() * other_b).dot(&(a * other_a.transpose()))
}

/// A dense matrix `[d_out, d_in]` as factors `A [rank, d_in]`, whose rows have length 1, and `B [d_out, rank]`, and the share of its norm that is
/// left out.
pub fn truncated(delta: Matrix, rank: usize) -> (Matrix, Matrix, f64) {
    let (d_out, d_in) = delta.shape();
    let rank = rank.min(d_out.min(d_in));
    let all = delta.norm();
    if rank == 0 || all == 0.0 {
        return (Matrix::zeros(rank, d_in), Matrix::zeros(d_out, rank), 0.0);
    }
    if d_out.min(d_in) <= DIRECT {
        let svd = Svd::of(&delta);
        let (a, b, _) = svd.leading(rank);
        return (a, b, share(&svd.values, rank));
    }
    // A layer of a large model fills a good part of the memory: one copy of it at a time.
    let wide = d_in > d_out;
    let delta = if wide { delta.transpose() } else { delta };
    let (near, far) = onto_directions(&delta, rank);
    let left_out = (all * all - far.norm_squared()).max(0.0).sqrt() / all;
    if !wide {
        return (near.transpose(), far, left_out);
    }
    let (mut a, mut b) = (far.transpose(), near);
    for (mut row, mut column) in a.row_iter_mut().zip(b.column_iter_mut()) {
        let length = row.norm();
        if length > 0.0 {
            row /= length;
        }
        column *= length;
    }
    (a, b, left_out)
}

/// The leading right directions of a matrix that is not wide, and its product with them.
fn onto_directions(matrix: &Matrix, rank: usize) -> (Matrix, Matrix) {
    // Rotations are slower, and always converge.
    let near = right_directions(matrix, rank).unwrap_or_else(|_| Svd::of(matrix).v.columns(0, rank).into_owned());
    let far = matrix * &near;
    (near, far)
}

/// Smaller side up to which a dense matrix is decomposed by rotations.
const DIRECT: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(rows: usize, columns: usize, shift: usize) -> Matrix {
        Matrix::from_fn(rows, columns, |r, c| (((r * columns + c + shift) * 37 % 101) as f64 * 0.37).sin())
    }

    #[test]
    fn values_and_directions_rebuild_the_matrix_for_every_shape_and_rank() {
        for (rows, columns) in [(7, 4), (4, 7), (5, 5), (3, 1)] {
            let matrix = wave(rows, columns, 3);
            let Svd { u, values, v } = Svd::of(&matrix);
            let rebuilt = &u * Matrix::from_diagonal(&nalgebra::DVector::from_vec(values.clone())) * v.transpose();
            assert!((rebuilt - &matrix).amax() < 1e-13 && values.is_sorted_by(|a, b| a >= b));
            let ones = v.transpose() * &v - Matrix::identity(values.len(), values.len());
            assert!(ones.amax() < 1e-13);
        }
        // A product of deficient rank, more components than a side.
        let (b, a) = (wave(4, 6, 1), wave(6, 9, 2));
        let svd = Svd::of_product(&b, &a);
        let (left_a, left_b, rest) = svd.leading(6);
        assert!((left_b * left_a - &b * &a).amax() < 1e-12 && rest < 1e-14);
    }

    #[test]
    fn the_inner_product_is_that_of_the_dense_matrices() {
        let [b, a, d, c] = [wave(5, 2, 1), wave(2, 7, 2), wave(5, 3, 3), wave(3, 7, 4)];
        assert!((inner_product([&b, &a], [&d, &c]) - (&b * &a).dot(&(&d * &c))).abs() < 1e-12);
    }
}
