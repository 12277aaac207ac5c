//! The discrete cosine transform as an orthonormal basis, by matrix product and by fast Fourier transform.
//!
//! `C[k, j] = s_k sqrt(2 / n) cos(pi k (2 j + 1) / (2 n))` with `s_0 = 1 / sqrt(2)` and `s_k = 1`: `C x` is the DCT-II of `x`, `C^T x` the
//! DCT-III. The fast form reorders a row and takes one complex transform of its length: "A fast cosine transform in one and two dimensions"
//! (Makhoul, 1980).

use std::collections::HashMap;
use std::f64::consts::PI;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;
use rustfft::num_complex::Complex32;
use rustfft::{Fft, FftPlanner};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::decompose::orthonormal_factor;
use crate::host::values;
use crate::random::{generator, normal};
use crate::vectorised::vectorised;

/// Orthonormal basis that the columns of `D` form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DctBasis {
    /// `D = C`: a row times `D` is its DCT-III.
    Dct3,
    /// `D = C^T`: a row times `D` is its DCT-II.
    Dct2,
    /// A random orthonormal matrix, always the same: to see what the transform itself is worth.
    Random,
}

/// The transform of one length. There is one in the process for each length, created on first use.
pub struct Dct {
    n: usize,
    forward: Arc<dyn Fft<f32>>,
    inverse: Arc<dyn Fft<f32>>,
    /// `exp(-i pi k / (2 n))`.
    twiddles: Vec<Complex32>,
    matrix: OnceLock<Vec<f32>>,
    random: OnceLock<Vec<f32>>,
    tensors: Mutex<Vec<(DctBasis, Device, Tensor<2>)>>,
}

impl Dct {
    /// The transform of rows of `n` values.
    pub fn of(n: usize) -> Arc<Self> {
        static KNOWN: LazyLock<Mutex<HashMap<usize, Arc<Dct>>>> = LazyLock::new(Mutex::default);
        let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        known.entry(n).or_insert_with(|| Arc::new(Self::new(n))).clone()
    }

    fn new(n: usize) -> Self {
        let mut planner = FftPlanner::new();
        let twiddle = |k: usize| {
            let (sin, cos) = (PI * k as f64 / (2 * n) as f64).sin_cos();
            Complex32::new(cos as f32, -sin as f32)
        };
        Self {
            n,
            forward: planner.plan_fft_forward(n),
            inverse: planner.plan_fft_inverse(n),
            twiddles: (0..n).map(twiddle).collect(),
            matrix: OnceLock::new(),
            random: OnceLock::new(),
            tensors: Mutex::default(),
        }
    }

    /// `C` in row-major order, `n x n`. Angles are reduced as whole numbers and cosines taken in f64: orthonormal to 1e-6 up to 4096.
    pub fn matrix(&self) -> &[f32] {
        self.matrix.get_or_init(|| {
            let n = self.n;
            let scale = (2.0 / n as f64).sqrt();
            let value = |place: usize| {
                let (k, j) = (place / n, place % n);
                let quarter = (k * (2 * j + 1)) % (4 * n);
                let factor = if k == 0 { std::f64::consts::FRAC_1_SQRT_2 } else { 1.0 };
                (factor * scale * (PI * quarter as f64 / (2 * n) as f64).cos()) as f32
            };
            (0..n * n).into_par_iter().map(value).collect()
        })
    }

    /// `D`, `[n, n]`; created once per device.
    pub fn tensor(&self, basis: DctBasis, device: &Device) -> Tensor<2> {
        let mut made = self.tensors.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, _, tensor)) = made.iter().find(|(kind, place, _)| *kind == basis && place == device) {
            return tensor.clone();
        }
        let values = match basis {
            DctBasis::Dct3 => self.matrix().to_vec(),
            DctBasis::Dct2 => (0..self.n * self.n).map(|i| self.matrix()[i % self.n * self.n + i / self.n]).collect(),
            DctBasis::Random => self.random().to_vec(),
        };
        let tensor = Tensor::from_data(TensorData::new(values, [self.n, self.n]), device);
        made.push((basis, device.clone(), tensor.clone()));
        tensor
    }

    fn random(&self) -> &[f32] {
        self.random.get_or_init(|| {
            let draws = normal(&mut generator(0, self.n as u64, 0), self.n * self.n);
            let gaussian = Tensor::from_data(TensorData::new(draws, [self.n, self.n]), &Device::default());
            values(orthonormal_factor(&gaussian))
        })
    }

    /// Every row of `rows` times `D`, in place.
    pub fn transform_rows(&self, rows: &mut [f32], basis: DctBasis) {
        if basis == DctBasis::Random {
            return rows.par_chunks_mut(self.n).for_each(|row| self.product(row));
        }
        // A fixed partition; rows do not depend on one another.
        rows.par_chunks_mut(2 * self.n).for_each_init(
            || (self.scratch(), vec![0.0; self.n]),
            |(memory, spare), rows| {
                let (a, b) = rows.split_at_mut(self.n);
                self.transform_pair(a, if b.is_empty() { spare } else { b }, basis, false, memory);
            },
        );
    }

    /// Memory that one thread needs for [`Dct::transform_pair`].
    pub fn scratch(&self) -> Vec<Complex32> {
        vec![
            Complex32::ZERO;
            self.n + self.forward.get_inplace_scratch_len().max(self.inverse.get_inplace_scratch_len())
        ]
    }

    /// Two rows times `D`, or times `D^T` when `back`, in place: one complex transform for both, as its real and its imaginary part.
    ///
    /// Each row is as exact as if it were alone: the distance to the product with the matrix is below `8 log2(2 n) eps` times the row's norm, and
    /// a row of zeros stays one.
    pub fn transform_pair(&self, a: &mut [f32], b: &mut [f32], basis: DctBasis, back: bool, memory: &mut [Complex32]) {
        let (z, scratch) = memory.split_at_mut(self.n);
        vectorised(
            #[inline(always)]
            || {
                // Rounding errors of a shared transform scale with the larger row: exact powers of two bring both rows to the same
                // magnitude.
                let (largest_a, largest_b) = (largest(a), largest(b));
                let apart = (largest_a >> 23) as i32 - (largest_b >> 23) as i32;
                let scaled = apart != 0 && [largest_a, largest_b].iter().all(|bits| (1..INFINITE).contains(bits));
                let scale = if scaled { power_of_two(apart.clamp(-126, 126)) } else { 1.0 };
                if scaled {
                    b.iter_mut().for_each(|x| *x *= scale);
                }
                match (basis, back) {
                    (DctBasis::Dct2, false) | (DctBasis::Dct3, true) => self.dct2_pair(a, b, z, scratch),
                    (DctBasis::Dct3, false) | (DctBasis::Dct2, true) => self.dct3_pair(a, b, z, scratch),
                    (DctBasis::Random, _) => unreachable!("a random basis has no fast transform"),
                }
                if scaled {
                    b.iter_mut().for_each(|x| *x /= scale);
                }
                if largest_a == 0 {
                    a.fill(0.0);
                }
                if largest_b == 0 {
                    b.fill(0.0);
                }
            },
        );
    }

    #[inline(always)]
    fn dct2_pair(&self, a: &mut [f32], b: &mut [f32], z: &mut [Complex32], scratch: &mut [Complex32]) {
        let n = self.n;
        let (front, back) = z.split_at_mut(n.div_ceil(2));
        for ((even, odd), (a, b)) in mirrored(front, back).zip(a.as_chunks::<2>().0.iter().zip(b.as_chunks::<2>().0)) {
            (*even, *odd) = (Complex32::new(a[0], b[0]), Complex32::new(a[1], b[1]));
        }
        if n % 2 == 1 {
            z[n / 2] = Complex32::new(a[n - 1], b[n - 1]);
        }
        self.forward.process_with_scratch(z, scratch);
        // The spectrum of a real row is its own mirror image, which separates the two.
        let half = (0.5 / n as f32).sqrt();
        (a[0], b[0]) = (z[0].re * (n as f32).sqrt().recip(), z[0].im * (n as f32).sqrt().recip());
        let spectra = z[1..].iter().zip(z[1..].iter().rev());
        let rows = a[1..].iter_mut().zip(&mut b[1..]);
        for (((a, b), (z, mirror)), w) in rows.zip(spectra).zip(&self.twiddles[1..]) {
            *a = half * ((z.re + mirror.re) * w.re - (z.im - mirror.im) * w.im);
            *b = half * ((z.im + mirror.im) * w.re - (mirror.re - z.re) * w.im);
        }
    }

    #[inline(always)]
    fn dct3_pair(&self, a: &mut [f32], b: &mut [f32], z: &mut [Complex32], scratch: &mut [Complex32]) {
        let n = self.n;
        let scale = (0.5 / n as f32).sqrt();
        let first = (n as f32).sqrt().recip();
        z[0] = Complex32::new(a[0] * first, b[0] * first);
        let rows = a[1..].iter().zip(a[1..].iter().rev()).zip(b[1..].iter().zip(b[1..].iter().rev()));
        for ((z, ((a, a_mirror), (b, b_mirror))), w) in z[1..].iter_mut().zip(rows).zip(&self.twiddles[1..]) {
            // (a - i a') conj(w) + i (b - i b') conj(w)
            let (re, im) = (a + b_mirror, b - a_mirror);
            *z = Complex32::new(scale * (re * w.re + im * w.im), scale * (im * w.re - re * w.im));
        }
        self.inverse.process_with_scratch(z, scratch);
        let (front, back) = z.split_at_mut(n.div_ceil(2));
        let rows = a.as_chunks_mut::<2>().0.iter_mut().zip(b.as_chunks_mut::<2>().0);
        for ((even, odd), (a, b)) in mirrored(front, back).zip(rows) {
            (*a, *b) = ([even.re, odd.re], [even.im, odd.im]);
        }
        if n % 2 == 1 {
            (a[n - 1], b[n - 1]) = (z[n / 2].re, z[n / 2].im);
        }
    }

    fn product(&self, row: &mut [f32]) {
        let mut result = vec![0.0; self.n];
        for (x, basis) in row.iter().zip(self.random().chunks(self.n)) {
            result.iter_mut().zip(basis).for_each(|(sum, d)| *sum += x * d);
        }
        row.copy_from_slice(&result);
    }
}

/// Bits of the largest absolute value of a row, which are in the order of the values; those of NaN are the largest.
#[inline(always)]
fn largest(row: &[f32]) -> u32 {
    row.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff))
}

/// Bits of the first value that is not finite.
const INFINITE: u32 = 0x7f80_0000;

/// `2^exponent`, for exponents of normal numbers.
#[inline(always)]
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// The first value with the last, the second with the one before, and so on.
#[inline(always)]
fn mirrored<'a>(
    front: &'a mut [Complex32],
    back: &'a mut [Complex32],
) -> impl Iterator<Item = (&'a mut Complex32, &'a mut Complex32)> {
    front.iter_mut().zip(back.iter_mut().rev())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows times the matrix, as the definition has it.
    fn plain(rows: &[f32], n: usize, basis: DctBasis) -> Vec<f32> {
        let dct = Dct::of(n);
        let c = |k: usize, j: usize| f64::from(dct.matrix()[k * n + j]);
        let entry = |row: &[f32], j: usize| -> f32 {
            let d = |k: usize| match basis {
                DctBasis::Dct3 => c(k, j),
                DctBasis::Dct2 => c(j, k),
                DctBasis::Random => unreachable!("it is no cosine"),
            };
            row.iter().enumerate().map(|(k, x)| f64::from(*x) * d(k)).sum::<f64>() as f32
        };
        rows.chunks(n).flat_map(|row| (0..n).map(move |j| entry(row, j))).collect()
    }

    #[test]
    fn the_basis_is_orthonormal() {
        for n in [1, 2, 3, 8, 13, 64, 500] {
            let dct = Dct::of(n);
            let c = dct.matrix();
            for a in (0..n).step_by(1 + n / 20) {
                for b in 0..n {
                    let dot: f64 = (0..n).map(|j| f64::from(c[a * n + j]) * f64::from(c[b * n + j])).sum();
                    assert!((dot - f64::from(u8::from(a == b))).abs() < 1e-6, "{n}: {a} {b} {dot}");
                }
            }
        }
        assert_eq!(Dct::of(1).matrix(), [1.0]);
        let half = std::f32::consts::FRAC_1_SQRT_2;
        for (ours, expected) in Dct::of(2).matrix().iter().zip([half, half, half, -half]) {
            assert!((ours - expected).abs() < 1e-7);
        }
    }

    #[test]
    fn the_fast_form_equals_the_product() {
        for n in [1, 2, 3, 8, 12, 13, 64, 512] {
            let rows: Vec<f32> = (0..3 * n).map(|i| (i as f32 * 1.7).sin() + (i % 5) as f32).collect();
            for basis in [DctBasis::Dct2, DctBasis::Dct3] {
                let mut fast = rows.clone();
                Dct::of(n).transform_rows(&mut fast, basis);
                let expected = plain(&rows, n, basis);
                let most = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
                for (ours, expected) in fast.iter().zip(&expected) {
                    assert!((ours - expected).abs() < 1e-5 * most, "{n} {basis:?}: {ours} {expected}");
                }
            }
        }
    }

    #[test]
    fn each_row_is_as_exact_as_if_it_were_alone() {
        for n in [2, 3, 8, 13, 64, 257, 512] {
            let mut rows: Vec<f32> = (0..4 * n).map(|i| (i as f32 * 1.7).sin() + 0.1).collect();
            rows[n..2 * n].fill(0.0);
            rows[2 * n..3 * n].iter_mut().for_each(|x| *x *= 1e-20);
            rows[3 * n..].iter_mut().for_each(|x| *x *= 1e12);
            for basis in [DctBasis::Dct2, DctBasis::Dct3] {
                let mut fast = rows.clone();
                Dct::of(n).transform_rows(&mut fast, basis);
                let expected = plain(&rows, n, basis);
                let bound = 8.0 * (2.0 * n as f32).log2() * f32::EPSILON;
                for row in 0..4 {
                    let part = |values: &[f32]| values[row * n..(row + 1) * n].to_vec();
                    let norm = part(&rows).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                    for (ours, expected) in part(&fast).iter().zip(part(&expected)) {
                        let apart = f64::from((ours - expected).abs());
                        assert!(apart <= f64::from(bound) * norm, "{n} {basis:?} row {row}: {ours} {expected}");
                    }
                }
                assert!(fast[n..2 * n].iter().all(|x| x.to_bits() == 0), "{n} {basis:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        for bad in [f32::NAN, f32::INFINITY] {
            for basis in [DctBasis::Dct2, DctBasis::Dct3] {
                let mut rows = vec![bad; 16];
                rows[8..].fill(0.0);
                Dct::of(8).transform_rows(&mut rows, basis);
                assert!(rows[..8].iter().any(|x| !x.is_finite()), "{bad} {basis:?}");
            }
        }
    }

    #[test]
    fn one_undoes_the_other() {
        let rows: Vec<f32> = (0..60).map(|i| (i as f32).cos()).collect();
        let mut there = rows.clone();
        Dct::of(15).transform_rows(&mut there, DctBasis::Dct2);
        Dct::of(15).transform_rows(&mut there, DctBasis::Dct3);
        for (a, b) in rows.iter().zip(there) {
            assert!((a - b).abs() < 1e-6);
        }
    }
}
