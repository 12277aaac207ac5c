//! Products of few rows with columns in blocks of `Q8_0`: eight columns at a time are turned into vectors while they are still bytes.

use std::arch::x86_64::*;
use std::ops::Range;

use super::parts::DEPTH;
use super::vectors::{Avx2, Vectors};
use super::work::finish;
use crate::narrow::ggml::BlockType;
use crate::vectorised::prefetch;

/// Columns that are computed together.
const LANES: usize = Avx2::WIDTH;
/// Groups of them: a sum waits for the one before, so that one alone would leave the processor idle.
const GROUPS: usize = 4;
/// Values of a block, and its bytes: a scale in f16, and a code for each value.
const BLOCK: usize = BlockType::Q8_0.values();
const BYTES: usize = BlockType::Q8_0.bytes();

/// A part of a product whose output has contiguous columns.
pub(super) struct Columns<'a> {
    pub out: *mut f32,
    pub out_stride: usize,
    pub add: bool,
    pub factor: f32,
    /// Rows of contiguous values.
    pub a: *const f32,
    pub a_stride: usize,
    pub rows: usize,
    pub depth: usize,
    /// Blocks of all columns of the matrix, one column after the other.
    pub blocks: &'a [u8],
    pub columns: Range<usize>,
}

impl Columns<'_> {
    /// Computes the same bits as the tiles with the widened columns.
    ///
    /// # Safety
    ///
    /// The processor has AVX2, FMA and F16C; `a` has at most four readable rows, whose depth is one of whole blocks; the output is writable for all
    /// rows and columns, and initialised when `add`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn multiply(&self) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match self.rows {
                1 => self.rows::<1>(),
                2 => self.rows::<2>(),
                3 => self.rows::<3>(),
                _ => self.rows::<4>(),
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<const R: usize>(&self) {
        let column = self.depth / BLOCK * BYTES;
        let blocks = &self.blocks[self.columns.start * column..self.columns.end * column];
        let count = self.columns.len();
        for left in (0..count).step_by(GROUPS * LANES) {
            // Missing columns are the last one again.
            let place = |lane: usize| (left + lane).min(count - 1) * column;
            let mut lines = [[blocks.as_ptr(); LANES]; GROUPS];
            for (lane, line) in lines.as_flattened_mut().iter_mut().enumerate() {
                *line = line.wrapping_add(place(lane));
            }
            let mut first = 0;
            while first < self.depth || first == 0 {
                let end = (first + DEPTH).min(self.depth);
                // SAFETY: lines and blocks are within those of the matrix, as sliced; the caller guarantees the rest.
                unsafe {
                    let mut sums = [[Avx2::splat(0.0); GROUPS]; R];
                    for depth in (first..end).step_by(BLOCK) {
                        self.block::<R>(&lines, column, depth, &mut sums);
                    }
                    let factor = Avx2::splat(self.factor);
                    for (row, sums) in sums.iter().enumerate() {
                        for (group, sum) in sums.iter().enumerate() {
                            let at = left + group * LANES;
                            if at < count {
                                let out = self.out.add(row * self.out_stride + at);
                                finish::<Avx2>(out, *sum, LANES.min(count - at), self.add || first > 0, factor);
                            }
                        }
                    }
                }
                first += DEPTH;
            }
        }
    }

    /// Adds the products with a block of each column.
    #[inline(always)]
    unsafe fn block<const R: usize>(
        &self,
        lines: &[[*const u8; LANES]; GROUPS],
        column: usize,
        depth: usize,
        sums: &mut [[__m256; GROUPS]; R],
    ) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let place = depth / BLOCK * BYTES;
            let mut scales = [Avx2::splat(0.0); GROUPS];
            for group in 0..GROUPS {
                let mut halves = [0u16; LANES];
                for lane in 0..LANES {
                    let line = lines[group][lane].add(place);
                    halves[lane] = line.cast::<u16>().read_unaligned();
                    // The same block of the columns that come next: there are too many lines for the processor to foresee it.
                    prefetch(line.wrapping_add(GROUPS * LANES * column));
                }
                scales[group] = _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()));
            }
            for half in [0, 16] {
                for group in 0..GROUPS {
                    let mut codes = [_mm_setzero_si128(); LANES];
                    for lane in 0..LANES {
                        codes[lane] = _mm_loadu_si128(lines[group][lane].add(place + 2 + half).cast());
                    }
                    let codes = turned(codes);
                    for pair in 0..LANES {
                        let (even, odd) = (codes[pair], _mm_srli_si128::<8>(codes[pair]));
                        for (side, codes) in [even, odd].into_iter().enumerate() {
                            let values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
                            let values = Avx2::multiply(scales[group], values);
                            for (row, sums) in sums.iter_mut().enumerate() {
                                let factor = *self.a.add(row * self.a_stride + depth + half + 2 * pair + side);
                                sums[group] = Avx2::multiply_add(Avx2::splat(factor), values, sums[group]);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Sixteen bytes of each of eight lines, turned: vector `i` has bytes `2 i` of all lines, then bytes `2 i + 1`.
#[inline(always)]
unsafe fn turned(lines: [__m128i; LANES]) -> [__m128i; LANES] {
    // SAFETY: the caller has the instructions.
    unsafe {
        let mut vectors = lines;
        // Lines that are four, two and one apart come to lie beside each other.
        for _ in 0..3 {
            let before = vectors;
            for i in 0..LANES / 2 {
                vectors[2 * i] = _mm_unpacklo_epi8(before[i], before[i + LANES / 2]);
                vectors[2 * i + 1] = _mm_unpackhi_epi8(before[i], before[i + LANES / 2]);
            }
        }
        vectors
    }
}
