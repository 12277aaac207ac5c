//! Leading eigenvectors of a symmetric matrix: Householder reflections to a tridiagonal matrix, bisection, inverse iteration.

use rayon::prelude::*;

use crate::vectorised::vectorised;

/// Share of the largest eigenvalue within which neighbouring eigenvectors are made orthogonal to each other.
const CLUSTER: f64 = 1e-3;
/// Error of vectors and of their residuals, as a share of the largest eigenvalue, up to which they are accepted.
const TOLERANCE: f64 = 1e-12;
/// Solutions of an inverse iteration; two reach working precision, the third corrects an unlucky start.
const ITERATIONS: usize = 3;
/// Eigenvalues that are bisected together.
const LANES: usize = 16;

/// The `rank` leading eigenvectors of a symmetric matrix `[n, n]` whose largest elements are near 1, by descending eigenvalue, one after
/// another.
///
/// None if they are not orthonormal to working precision, as can happen for equal eigenvalues; the caller then needs another method.
pub(crate) fn leading_eigenvectors(matrix: Vec<f64>, n: usize, rank: usize) -> Option<Vec<f64>> {
    let reduced = Tridiagonal::of(matrix, n);
    let values = reduced.leading_values(rank);
    let mut vectors = reduced.vectors(&values);
    if !reduced.solved_by(&values, &vectors) {
        return None;
    }
    vectors.par_chunks_exact_mut(n).for_each(|vector| reduced.reflect_back(vector));
    Some(vectors)
}

/// `Q^T A Q` with the reflections that `Q` is made of.
struct Tridiagonal {
    n: usize,
    diagonal: Vec<f64>,
    /// Element `i` couples `i - 1` and `i`; the first is 0.
    coupling: Vec<f64>,
    /// Row `i` starts with the `i` elements of a reflection's vector.
    reflections: Vec<f64>,
    /// Twice the reciprocal square of each vector's length, or 0 for no reflection.
    weights: Vec<f64>,
    /// Bound of all eigenvalues' magnitudes.
    size: f64,
}

impl Tridiagonal {
    /// Reduces row by row from the last one, on the lower triangle. The change that a reflection makes is applied when the next one reads
    /// the matrix.
    fn of(mut a: Vec<f64>, n: usize) -> Self {
        let (mut diagonal, mut coupling, mut weights) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        // The pending change is `v w^T + w v^T`.
        let (mut v, mut w, mut product) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        for i in (0..n).rev() {
            vectorised(
                #[inline(always)]
                || {
                    let (above, row) = a.split_at_mut(i * n);
                    let row = &mut row[..=i];
                    change(row, v[i], &w, w[i], &v);
                    diagonal[i] = row[i];
                    let row = &mut row[..i];
                    let length = dot(row, row).sqrt();
                    let Some(last) = row.last_mut() else { return };
                    let target = if *last > 0.0 { -length } else { length };
                    coupling[i] = if length == 0.0 { 0.0 } else { target };
                    *last -= coupling[i];
                    let square = dot(row, row);
                    let weight = if square > f64::MIN_POSITIVE { 2.0 / square } else { 0.0 };
                    weights[i] = weight;
                    let product = &mut product[..i];
                    product.fill(0.0);
                    for j in 0..i {
                        let other = &mut above[j * n..][..=j];
                        change(other, v[j], &w, w[j], &v);
                        let (own, other) = (other[j], &other[..j]);
                        product[j] += dot_and_add(other, &row[..j], &mut product[..j], row[j]) + own * row[j];
                    }
                    let half = 0.5 * weight * weight * dot(product, row);
                    v[..i].copy_from_slice(row);
                    for (w, (product, v)) in w.iter_mut().zip(product.iter().zip(row.iter())) {
                        *w = weight * product - half * v;
                    }
                },
            );
        }
        let size = (0..n)
            .map(|i| diagonal[i].abs() + coupling[i].abs() + coupling.get(i + 1).map_or(0.0, |next| next.abs()))
            .fold(f64::MIN_POSITIVE, f64::max);
        Self { n, diagonal, coupling, reflections: a, weights, size }
    }

    /// The largest eigenvalues, descending, each by bisection on the number of eigenvalues below.
    fn leading_values(&self, rank: usize) -> Vec<f64> {
        let smallest = f64::EPSILON * f64::EPSILON * self.size;
        let squares: Vec<f64> = self.coupling.iter().map(|c| c * c).collect();
        let groups: Vec<[f64; LANES]> = (0..rank.div_ceil(LANES))
            .into_par_iter()
            .map(|group| {
                let (mut low, mut high) = ([-self.size; LANES], [self.size; LANES]);
                vectorised(
                    #[inline(always)]
                    || {
                        for _ in 0..60 {
                            let (mut middle, mut quotient, mut below) = ([0.0; LANES], [1.0; LANES], [0.0; LANES]);
                            for lane in 0..LANES {
                                middle[lane] = 0.5 * (low[lane] + high[lane]);
                            }
                            for (diagonal, square) in self.diagonal.iter().zip(&squares) {
                                for lane in 0..LANES {
                                    let next = diagonal - middle[lane] - square / quotient[lane];
                                    quotient[lane] = if next.abs() < smallest { -smallest } else { next };
                                    below[lane] += if quotient[lane] < 0.0 { 1.0 } else { 0.0 };
                                }
                            }
                            for lane in 0..LANES {
                                // The number `rank` from above has as many below as are left.
                                let wanted = (self.n - 1).saturating_sub(group * LANES + lane) as f64;
                                let lower = below[lane] > wanted;
                                high[lane] = if lower { middle[lane] } else { high[lane] };
                                low[lane] = if lower { low[lane] } else { middle[lane] };
                            }
                        }
                    },
                );
                std::array::from_fn(|lane| 0.5 * (low[lane] + high[lane]))
            })
            .collect();
        groups.as_flattened()[..rank].to_vec()
    }

    /// An eigenvector for each of falling eigenvalues; those of neighbours are orthogonal.
    fn vectors(&self, values: &[f64]) -> Vec<f64> {
        let n = self.n;
        let mut vectors = vec![0.0; values.len() * n];
        let (mut first, mut last) = (0, f64::INFINITY);
        for (number, value) in values.iter().enumerate() {
            if number > 0 && values[number - 1] - value > CLUSTER * self.size {
                first = number;
            }
            // Apart by a little, so that equal eigenvalues have factors of their own.
            last = value.min(last - 10.0 * f64::EPSILON * self.size);
            let factors = Factors::of(self, last);
            let (before, vector) = vectors.split_at_mut(number * n);
            let vector = &mut vector[..n];
            let mut state = number as u64 + 1;
            vector.fill_with(|| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
            });
            for _ in 0..ITERATIONS {
                factors.solve(vector);
                vectorised(
                    #[inline(always)]
                    || {
                        // Solutions grow by the reciprocal distance of the eigenvalue.
                        normalise(vector);
                        for _ in 0..2 {
                            for other in before[first * n..].chunks_exact(n) {
                                let along = dot(other, vector);
                                vector.iter_mut().zip(other).for_each(|(value, other)| *value -= along * other);
                            }
                        }
                        normalise(vector);
                    },
                );
            }
        }
        vectors
    }

    /// Reports whether the vectors are orthonormal and solve the equation, to working precision.
    fn solved_by(&self, values: &[f64], vectors: &[f64]) -> bool {
        let n = self.n;
        let vectors: Vec<&[f64]> = vectors.chunks_exact(n).collect();
        vectors.par_iter().zip(values).enumerate().all(|(number, (vector, value))| {
            let residual = (0..n).map(|i| {
                let before = if i > 0 { self.coupling[i] * vector[i - 1] } else { 0.0 };
                let after = if i + 1 < n { self.coupling[i + 1] * vector[i + 1] } else { 0.0 };
                (before + (self.diagonal[i] - value) * vector[i] + after).abs()
            });
            let orthonormal = vectorised(
                #[inline(always)]
                || {
                    let others = vectors[..number].iter().map(|other| dot(other, vector).abs());
                    others.fold((dot(vector, vector) - 1.0).abs(), f64::max) <= TOLERANCE
                },
            );
            orthonormal && residual.fold(0.0, f64::max) <= TOLERANCE * self.size
        })
    }

    /// Transforms an eigenvector of the tridiagonal matrix into one of the original matrix.
    fn reflect_back(&self, vector: &mut [f64]) {
        vectorised(
            #[inline(always)]
            || {
                for i in 1..self.n {
                    let reflection = &self.reflections[i * self.n..][..i];
                    let along = self.weights[i] * dot(reflection, &vector[..i]);
                    vector.iter_mut().zip(reflection).for_each(|(value, v)| *value -= along * v);
                }
            },
        );
    }
}

/// Factors of a tridiagonal matrix less a multiple of the identity, with row pivoting.
struct Factors {
    /// Diagonal and the two above it, of the upper factor.
    upper: Vec<[f64; 3]>,
    /// Of each elimination the multiple, and whether its rows were exchanged.
    lower: Vec<(f64, bool)>,
}

impl Factors {
    fn of(matrix: &Tridiagonal, shift: f64) -> Self {
        let (n, smallest) = (matrix.n, f64::EPSILON * matrix.size);
        let after = |i: usize| matrix.coupling.get(i + 1).copied().unwrap_or(0.0);
        let (mut upper, mut lower) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let mut row = [matrix.diagonal[0] - shift, after(0), 0.0];
        for i in 1..n {
            let next = [matrix.coupling[i], matrix.diagonal[i] - shift, after(i)];
            let exchange = next[0].abs() > row[0].abs();
            let (pivot, other) = if exchange { (next, row) } else { (row, next) };
            let multiple = if pivot[0] == 0.0 { 0.0 } else { other[0] / pivot[0] };
            upper.push(pivot);
            lower.push((multiple, exchange));
            row = [other[1] - multiple * pivot[1], other[2] - multiple * pivot[2], 0.0];
        }
        upper.push(row);
        for [pivot, ..] in &mut upper {
            if pivot.abs() < smallest {
                *pivot = smallest.copysign(*pivot);
            }
        }
        Self { upper, lower }
    }

    fn solve(&self, x: &mut [f64]) {
        for (i, (multiple, exchange)) in self.lower.iter().enumerate() {
            if *exchange {
                x.swap(i, i + 1);
            }
            x[i + 1] -= multiple * x[i];
        }
        let (mut next, mut after) = (0.0, 0.0);
        for (x, [pivot, first, second]) in x.iter_mut().zip(&self.upper).rev() {
            *x = (*x - first * next - second * after) / pivot;
            (next, after) = (*x, next);
        }
    }
}

#[inline(always)]
fn normalise(x: &mut [f64]) {
    let largest = x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    x.iter_mut().for_each(|x| *x /= largest);
    let factor = dot(x, x).sqrt().recip();
    x.iter_mut().for_each(|x| *x *= factor);
}

/// `x -= a u + b v`.
#[inline(always)]
fn change(x: &mut [f64], a: f64, u: &[f64], b: f64, v: &[f64]) {
    for (x, (u, v)) in x.iter_mut().zip(u.iter().zip(v)) {
        *x -= a * u + b * v;
    }
}

/// `x y`, and adds `factor x` to `sum`.
#[inline(always)]
fn dot_and_add(x: &[f64], y: &[f64], sum: &mut [f64], factor: f64) -> f64 {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x);
    dot(x, y)
}

/// The sum of products, in 16 parts.
#[inline(always)]
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut parts = [0.0; 16];
    let ((a, rest_of_a), (b, rest_of_b)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        parts.iter_mut().zip(a).zip(b).for_each(|((part, a), b)| *part += a * b);
    }
    let rest: f64 = rest_of_a.iter().zip(rest_of_b).map(|(a, b)| a * b).sum();
    parts.iter().sum::<f64>() + rest
}
