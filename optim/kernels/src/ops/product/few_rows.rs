//! Products of few rows, which use every element of the other input only a few times: it is read once, in order, and not packed.

use super::panels::Scratch;
use super::parts::DEPTH;
use super::vectors::{Avx2, Vectors, transposed};
use super::work::{Work, finish};

/// Columns whose sums stay in the first-level cache.
const SPAN: usize = 1024;
/// Lines of the other input that are read at a time.
const LINES: usize = 8;

/// Computes the same bits as the tiles.
///
/// # Safety
///
/// As for [`Vectors`], of AVX2 at least; at most [`super::parts::FEW`] rows, and rows or columns of `b` whose elements are contiguous.
#[inline(always)]
pub(super) unsafe fn multiply<V: Vectors>(work: Work) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if work.b_strides[1] != 1 {
            return match work.rows {
                1 => columns::<1, 4>(work),
                2 => columns::<2, 4>(work),
                3 => columns::<3, 2>(work),
                _ => columns::<4, 2>(work),
            };
        }
        match work.rows {
            1 => lines::<V, 1>(work),
            2 => lines::<V, 2>(work),
            3 => lines::<V, 3>(work),
            _ => lines::<V, 4>(work),
        }
    }
}

#[inline(always)]
unsafe fn lines<V: Vectors, const R: usize>(work: Work) {
    let (_scratch, sums, _) = Scratch::of(R * SPAN, 0);
    let mut first = 0;
    while first < work.depth || first == 0 {
        let depth = DEPTH.min(work.depth - first);
        for left in (0..work.columns).step_by(SPAN) {
            let columns = SPAN.min(work.columns - left);
            // SAFETY: depths and columns are within those of the work, sums within the scratch memory.
            unsafe {
                let a = work.a.add(first * work.a_strides[1]);
                let b = work.b.add(first * work.b_strides[0] + left);
                let mut part = Part { columns, a, a_strides: work.a_strides, b, b_stride: work.b_strides[0], sums };
                for row in 0..R {
                    for at in (0..columns).step_by(V::WIDTH) {
                        V::store(sums.add(row * SPAN + at), V::splat(0.0));
                    }
                }
                for _ in 0..depth / LINES {
                    part.add::<V, R, LINES>();
                }
                for _ in 0..depth % LINES {
                    part.add::<V, R, 1>();
                }
                let factor = V::splat(work.factor);
                for row in 0..R {
                    let out = work.out.add(row * work.out_stride + left);
                    for at in (0..columns).step_by(V::WIDTH) {
                        let sum = V::load(sums.add(row * SPAN + at));
                        finish::<V>(out.add(at), sum, V::WIDTH.min(columns - at), work.add || first > 0, factor);
                    }
                }
            }
        }
        first += DEPTH;
    }
}

/// Columns of one depth after another, and the sums so far.
struct Part {
    columns: usize,
    a: *const f32,
    a_strides: [usize; 2],
    b: *const f32,
    b_stride: usize,
    sums: *mut f32,
}

impl Part {
    /// Adds the products of the next `L` depths.
    #[inline(always)]
    unsafe fn add<V: Vectors, const R: usize, const L: usize>(&mut self) {
        // SAFETY: the caller guarantees this number of depths.
        unsafe {
            let mut values = [[V::splat(0.0); L]; R];
            for (row, values) in values.iter_mut().enumerate() {
                for (line, value) in values.iter_mut().enumerate() {
                    *value = V::splat(*self.a.add(row * self.a_strides[0] + line * self.a_strides[1]));
                }
            }
            for at in (0..self.columns).step_by(V::WIDTH) {
                let count = V::WIDTH.min(self.columns - at);
                let mut sums = [V::splat(0.0); R];
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(self.sums.add(row * SPAN + at));
                }
                for line in 0..L {
                    let from = self.b.add(line * self.b_stride + at);
                    let column = if count == V::WIDTH { V::load(from) } else { V::load_part(from, count) };
                    for (sum, values) in sums.iter_mut().zip(&values) {
                        *sum = V::multiply_add(values[line], column, *sum);
                    }
                }
                for (row, sum) in sums.iter().enumerate() {
                    V::store(self.sums.add(row * SPAN + at), *sum);
                }
            }
            self.a = self.a.wrapping_add(L * self.a_strides[1]);
            self.b = self.b.wrapping_add(L * self.b_stride);
        }
    }
}

/// Computes columns of `b` with contiguous elements, `G` times eight of them at a time.
#[inline(always)]
unsafe fn columns<const R: usize, const G: usize>(work: Work) {
    const LANES: usize = Avx2::WIDTH;
    let [_, stride] = work.b_strides;
    for left in (0..work.columns).step_by(G * LANES) {
        let count = work.columns - left;
        let mut first = 0;
        while first < work.depth || first == 0 {
            let depth = DEPTH.min(work.depth - first);
            // SAFETY: depths and columns are within those of the work.
            unsafe {
                let mut a = work.a.add(first * work.a_strides[1]);
                let mut b = work.b.add(left * stride + first);
                let mut sums = [[Avx2::splat(0.0); G]; R];
                for _ in 0..depth / LANES {
                    for group in 0..G.min(count.div_ceil(LANES)) {
                        let columns = transposed(b.add(group * LANES * stride), stride, count - group * LANES);
                        for (line, column) in columns.iter().enumerate() {
                            for (row, sums) in sums.iter_mut().enumerate() {
                                let value = Avx2::splat(*a.add(row * work.a_strides[0] + line * work.a_strides[1]));
                                sums[group] = Avx2::multiply_add(value, *column, sums[group]);
                            }
                        }
                    }
                    a = a.wrapping_add(LANES * work.a_strides[1]);
                    b = b.wrapping_add(LANES);
                }
                for _ in 0..depth % LANES {
                    for group in 0..G.min(count.div_ceil(LANES)) {
                        let mut column = [0.0f32; LANES];
                        for (lane, value) in column.iter_mut().enumerate().take(count - group * LANES) {
                            *value = *b.add((group * LANES + lane) * stride);
                        }
                        let column = Avx2::load(column.as_ptr());
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let value = Avx2::splat(*a.add(row * work.a_strides[0]));
                            sums[group] = Avx2::multiply_add(value, column, sums[group]);
                        }
                    }
                    a = a.wrapping_add(work.a_strides[1]);
                    b = b.wrapping_add(1);
                }
                let factor = Avx2::splat(work.factor);
                for (row, sums) in sums.iter().enumerate() {
                    for (group, sum) in sums.iter().enumerate().take(count.div_ceil(LANES)) {
                        let at = group * LANES;
                        let out = work.out.add(row * work.out_stride + left + at);
                        finish::<Avx2>(out, *sum, LANES.min(count - at), work.add || first > 0, factor);
                    }
                }
            }
            first += DEPTH;
        }
    }
}
