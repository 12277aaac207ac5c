//! Products of few rows with narrow matrices whose rows are contiguous: they are read in order, and the sums stay in the first-level cache.

use std::ops::Range;

use super::narrow::{Narrow, Values, Widened};
use super::parts::{DEPTH, FEW};
use super::target::Matrix;
use crate::ops::flex::vectorised;
use crate::vectorised::prefetch;

/// Rows of the narrow matrix that are read at a time.
const LINES: usize = 8;
/// Sums that are added to together.
const LANES: usize = 16;

/// Columns of a product of at most [`FEW`] rows.
pub(super) struct Lines<'a> {
    /// The first of the columns.
    pub out: *mut f32,
    pub strides: [usize; 2],
    pub add: bool,
    pub factor: f32,
    pub a: Matrix<&'a [f32]>,
    pub b: Narrow<'a>,
    pub columns: Range<usize>,
}

impl Lines<'_> {
    /// Computes the same bits as the kernels with the widened matrix; `scratch` may hold anything.
    ///
    /// # Safety
    ///
    /// As for [`super::multiply`].
    pub unsafe fn multiply(&self, scratch: &mut Vec<f32>) {
        let Self { out, strides, add, factor, a, b, ref columns } = *self;
        let width = columns.len();
        let padded = width.next_multiple_of(LANES);
        if scratch.len() < (FEW + LINES) * padded {
            scratch.resize((FEW + LINES) * padded, 0.0);
        }
        let (sums, lines) = scratch.split_at_mut(FEW * padded);
        for first in (0..b.rows.max(1)).step_by(DEPTH) {
            sums[..a.rows * padded].fill(0.0);
            let end = (first + DEPTH).min(b.rows);
            for top in (first..end).step_by(LINES) {
                let count = LINES.min(end - top);
                let start = top * b.row_stride + columns.start;
                if let Values::Codes(_) = b.data {
                    b.pieces(start, b.row_stride, width, &mut lines[..count * padded], padded);
                }
                vectorised(
                    #[inline(always)]
                    || {
                        for (row, sums) in sums.chunks_exact_mut(padded).take(a.rows).enumerate() {
                            let factor = |line| a.data[row * a.row_stride + (top + line) * a.column_stride];
                            match b.data {
                                Values::Bf16(values) => {
                                    add_lines(&mut sums[..width], count, factor, &values[start..], b.row_stride);
                                }
                                Values::F16(values) => {
                                    add_lines(&mut sums[..width], count, factor, &values[start..], b.row_stride);
                                }
                                Values::Codes(_) => add_lines(sums, count, factor, lines, padded),
                            }
                        }
                    },
                );
            }
            vectorised(
                #[inline(always)]
                || {
                    for (row, sums) in sums.chunks_exact(padded).take(a.rows).enumerate() {
                        for (column, sum) in sums[..width].iter().enumerate() {
                            // SAFETY: guaranteed by the caller.
                            unsafe {
                                let out = out.add(row * strides[0] + column * strides[1]);
                                *out = if add || first > 0 { sum.mul_add(factor, *out) } else { sum * factor };
                            }
                        }
                    }
                },
            );
        }
    }
}

/// Adds lines, multiplied by factors, to sums, in order; each line begins `stride` behind the one before.
#[inline(always)]
fn add_lines<T: Widened>(sums: &mut [f32], count: usize, factor: impl Fn(usize) -> f32, lines: &[T], stride: usize) {
    if count == LINES {
        let factors: [f32; LINES] = std::array::from_fn(factor);
        return add_some(sums, &factors, lines, stride);
    }
    for line in 0..count {
        add_some(sums, &[factor(line)], &lines[line * stride..], stride);
    }
}

#[inline(always)]
fn add_some<T: Widened, const L: usize>(sums: &mut [f32], factors: &[f32; L], lines: &[T], stride: usize) {
    let lines: [&[T]; L] = std::array::from_fn(|line| &lines[line * stride..][..sums.len()]);
    let (whole, rest) = sums.as_chunks_mut::<LANES>();
    let last = whole.len() * LANES;
    for (at, sums) in whole.iter_mut().enumerate() {
        let mut total = *sums;
        for (factor, line) in factors.iter().zip(&lines) {
            let values: &[T; LANES] = &line.as_chunks().0[at];
            // The lines that come next: a piece of each is too short for the processor to foresee them.
            prefetch(values.as_ptr().wrapping_add(L * stride));
            for (total, value) in total.iter_mut().zip(values) {
                *total = factor.mul_add(value.widened(), *total);
            }
        }
        *sums = total;
    }
    for (at, sum) in rest.iter_mut().enumerate() {
        for (factor, line) in factors.iter().zip(&lines) {
            *sum = factor.mul_add(line[last + at].widened(), *sum);
        }
    }
}
