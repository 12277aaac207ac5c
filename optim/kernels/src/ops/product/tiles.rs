//! The kernel of products: tiles of the output from packed panels of the inputs.
//!
//! Every element of the output is the sum of its products in rising order, [`DEPTH`] at a time, each product and addition rounded once together:
//! its bits depend neither on the instruction set nor on the part of the output that is computed.

use super::few_rows;
use super::panels::{GROUP, Scratch, pack, panel_size};
use super::parts::{DEPTH, FEW};
use super::vectors::{Avx2, Avx512, Vectors};
use super::work::{Work, finish};
use crate::vectorised::prefetch;

/// Columns that are packed at a time, so that they stay in the second-level cache.
const COLUMNS: usize = 256;
/// Rows that are packed at a time at most.
const ROWS: usize = 1536;
/// Columns for which it does not pay to pack rows with contiguous elements.
const NARROW: usize = 128;
/// The same for other rows.
const NARROWEST: usize = 16;

/// # Safety
///
/// The processor has AVX-512; inputs are readable and the output writable, and initialised if added to.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn avx512(work: Work) {
    // SAFETY: guaranteed by the caller.
    unsafe { multiply::<Avx512>(work) }
}

/// # Safety
///
/// As for [`avx512`], with AVX2.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(work: Work) {
    // SAFETY: guaranteed by the caller.
    unsafe { multiply::<Avx2>(work) }
}

#[inline(always)]
unsafe fn multiply<V: Vectors>(work: Work) {
    let Work { rows, columns, depth, a_strides, b_strides, .. } = work;
    if rows <= FEW && b_strides.contains(&1) {
        // SAFETY: guaranteed by the caller.
        return unsafe { few_rows::multiply::<V>(work) };
    }
    let width = 2 * V::WIDTH;
    // A narrow output uses each element of a row too seldom.
    let packs_rows = columns > if a_strides[1] == 1 { NARROW } else { NARROWEST };
    let panels = rows.div_ceil(V::ROWS).div_ceil(rows.div_ceil(ROWS));
    let (block_rows, block_columns) = (panels * V::ROWS, COLUMNS.min(columns.next_multiple_of(width)));
    let most = DEPTH.min(depth);
    let for_rows = if packs_rows { panels * panel_size(V::ROWS, most) } else { 0 };
    let (_scratch, packed_b, packed_a) = Scratch::of(block_columns / width * panel_size(width, most), for_rows);
    let mut first = 0;
    // At least once: an empty sum is 0.
    while first < depth || first == 0 {
        let depth = DEPTH.min(depth - first);
        for top in (0..rows).step_by(block_rows) {
            let rows = block_rows.min(rows - top);
            for left in (0..columns).step_by(block_columns) {
                let columns = block_columns.min(columns - left);
                // SAFETY: all rows, columns and depths are within those of the work, and panels within the scratch memory.
                unsafe {
                    let b = work.b.add(first * b_strides[0] + left * b_strides[1]);
                    pack::<V>(b, [b_strides[1], b_strides[0]], columns, depth, packed_b, width);
                    for panel in (0..rows).step_by(V::ROWS) {
                        let a = work.a.add((top + panel) * a_strides[0] + first * a_strides[1]);
                        let packed =
                            packed_a.add(if packs_rows { panel / V::ROWS * panel_size(V::ROWS, depth) } else { 0 });
                        if packs_rows && left == 0 && panel % (V::ROWS * GROUP) == 0 {
                            pack::<V>(a, a_strides, (rows - panel).min(V::ROWS * GROUP), depth, packed, V::ROWS);
                        }
                        let row = Row {
                            columns,
                            depth,
                            a: if packs_rows { packed } else { a },
                            a_strides,
                            b: packed_b,
                            out: work.out.add((top + panel) * work.out_stride + left),
                            out_stride: work.out_stride,
                            add: work.add || first > 0,
                            factor: work.factor,
                        };
                        let height = V::ROWS.min(rows - panel);
                        match packs_rows {
                            true => row.make::<V, true>(height),
                            false => row.make::<V, false>(height),
                        }
                    }
                }
            }
        }
        first += DEPTH;
    }
}

/// A row of tiles.
#[derive(Clone, Copy)]
struct Row {
    columns: usize,
    depth: usize,
    a: *const f32,
    a_strides: [usize; 2],
    b: *const f32,
    out: *mut f32,
    out_stride: usize,
    add: bool,
    factor: f32,
}

impl Row {
    /// Computes rows of the output, from a packed panel or from rows in their original layout.
    #[inline(always)]
    unsafe fn make<V: Vectors, const PACKED: bool>(self, height: usize) {
        let mut done = 0;
        while done < height {
            let [row_step, _] = self.steps::<V, PACKED>();
            // SAFETY: `done` rows of the panel were computed before.
            unsafe {
                let rest = Self { a: self.a.add(done * row_step), out: self.out.add(done * self.out_stride), ..self };
                done += match (height - done, V::ROWS) {
                    (12, 12) => rest.tiles::<V, PACKED, 12>(),
                    (8.., 12) => rest.tiles::<V, PACKED, 8>(),
                    (6, 6) => rest.tiles::<V, PACKED, 6>(),
                    (4.., _) => rest.tiles::<V, PACKED, 4>(),
                    (2.., _) => rest.tiles::<V, PACKED, 2>(),
                    _ => rest.tiles::<V, PACKED, 1>(),
                };
            }
        }
    }

    /// Strides from one row to the next and from one depth to the next.
    #[inline(always)]
    fn steps<V: Vectors, const PACKED: bool>(&self) -> [usize; 2] {
        if PACKED { [1, V::ROWS] } else { self.a_strides }
    }

    #[inline(always)]
    unsafe fn tiles<V: Vectors, const PACKED: bool, const R: usize>(mut self) -> usize {
        let width = 2 * V::WIDTH;
        // SAFETY: at least as many columns are left as the tiles compute.
        unsafe {
            while self.columns >= width {
                self.tile::<V, PACKED, R, 2>(V::WIDTH);
                self.columns -= width;
                self.b = self.b.add(panel_size(width, self.depth));
                self.out = self.out.add(width);
            }
            match self.columns {
                0 => {}
                columns if columns <= V::WIDTH => self.tile::<V, PACKED, R, 1>(columns),
                columns => self.tile::<V, PACKED, R, 2>(columns - V::WIDTH),
            }
        }
        R
    }

    /// A tile of `R` rows and `N` vectors, the last one of `last` columns.
    #[inline(always)]
    unsafe fn tile<V: Vectors, const PACKED: bool, const R: usize, const N: usize>(self, last: usize) {
        // SAFETY: the caller guarantees rows, columns and depth.
        unsafe {
            for row in 0..R {
                prefetch(self.out.wrapping_add(row * self.out_stride));
                prefetch(self.out.wrapping_add(row * self.out_stride + N * V::WIDTH - 1));
            }
            let mut sums = [[V::splat(0.0); N]; R];
            let [row_step, step] = self.steps::<V, PACKED>();
            let (mut a, mut b) = (self.a, self.b);
            for _ in 0..self.depth {
                let mut columns = [V::splat(0.0); N];
                for (n, column) in columns.iter_mut().enumerate() {
                    *column = V::load(b.add(n * V::WIDTH));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = V::splat(*a.add(row * row_step));
                    for (sum, column) in sums.iter_mut().zip(&columns) {
                        *sum = V::multiply_add(value, *column, *sum);
                    }
                }
                a = a.wrapping_add(step);
                b = b.add(2 * V::WIDTH);
            }
            let factor = V::splat(self.factor);
            for (row, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    let out = self.out.add(row * self.out_stride + n * V::WIDTH);
                    let count = if n + 1 < N { V::WIDTH } else { last };
                    finish::<V>(out, *sum, count, self.add, factor);
                }
            }
        }
    }
}
