//! Vectors of f32 of the instruction sets that the kernels of products are written for.

use std::arch::x86_64::*;

/// Vectors of one instruction set.
///
/// Every function needs a processor with the instruction set, pointers to as many elements as it reads or writes, and a caller that is compiled
/// for the instruction set, into which it is inlined.
#[allow(clippy::missing_safety_doc, reason = "stated once for all above")]
pub(super) trait Vectors {
    /// A vector.
    type Vector: Copy;
    /// Elements of a vector.
    const WIDTH: usize;
    /// Rows of a tile: with two vectors a row they leave registers for the inputs.
    const ROWS: usize;

    unsafe fn splat(value: f32) -> Self::Vector;
    unsafe fn load(from: *const f32) -> Self::Vector;
    unsafe fn store(to: *mut f32, vector: Self::Vector);
    /// The first `count` elements of memory, then zeros.
    unsafe fn load_part(from: *const f32, count: usize) -> Self::Vector;
    /// Writes the first `count` elements alone.
    unsafe fn store_part(to: *mut f32, vector: Self::Vector, count: usize);
    unsafe fn multiply(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a b + c`, rounded once.
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
}

/// AVX2 with fused multiplication and addition.
pub(super) struct Avx2;

/// A mask of the first `count` lanes.
#[inline(always)]
unsafe fn lanes(count: usize) -> __m256i {
    // SAFETY: the caller has the instructions.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

// SAFETY of all functions: as required by the trait.
#[allow(clippy::undocumented_unsafe_blocks, reason = "each passes on what the trait demands")]
impl Vectors for Avx2 {
    type Vector = __m256;
    const WIDTH: usize = 8;
    const ROWS: usize = 6;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: __m256) {
        unsafe { _mm256_storeu_ps(to, vector) }
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(from, lanes(count)) }
    }
    #[inline(always)]
    unsafe fn store_part(to: *mut f32, vector: __m256, count: usize) {
        unsafe { _mm256_maskstore_ps(to, lanes(count), vector) }
    }
    #[inline(always)]
    unsafe fn multiply(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
}

/// AVX-512, of which the foundation suffices here.
pub(super) struct Avx512;

#[allow(clippy::undocumented_unsafe_blocks, reason = "each passes on what the trait demands")]
impl Vectors for Avx512 {
    type Vector = __m512;
    const WIDTH: usize = 16;
    const ROWS: usize = 12;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: __m512) {
        unsafe { _mm512_storeu_ps(to, vector) }
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(((1u32 << count) - 1) as u16, from) }
    }
    #[inline(always)]
    unsafe fn store_part(to: *mut f32, vector: __m512, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, ((1u32 << count) - 1) as u16, vector) }
    }
    #[inline(always)]
    unsafe fn multiply(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
}

/// Eight elements of each of eight lines as columns: element `k` of line `l`, read at `l * stride + k`, is lane `l` of vector `k`. With fewer
/// `lines` the last one is repeated for the missing ones.
///
/// # Safety
///
/// As for [`Vectors`], of AVX2; eight elements of every line must be readable.
#[inline(always)]
pub(super) unsafe fn transposed(from: *const f32, stride: usize, lines: usize) -> [__m256; 8] {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut halves = [_mm256_setzero_ps(); 8];
        for i in 0..4 {
            let (low, high) = (from.add(i.min(lines - 1) * stride), from.add((i + 4).min(lines - 1) * stride));
            for half in 0..2 {
                let (low, high) = (_mm_loadu_ps(low.add(4 * half)), _mm_loadu_ps(high.add(4 * half)));
                halves[4 * half + i] = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high);
            }
        }
        let mut columns = halves;
        for half in [0, 4] {
            let (low, high) = (_mm256_unpacklo_ps, _mm256_unpackhi_ps);
            let (ab, cd) = (low(halves[half], halves[half + 1]), low(halves[half + 2], halves[half + 3]));
            columns[half] = _mm256_shuffle_ps::<0x44>(ab, cd);
            columns[half + 1] = _mm256_shuffle_ps::<0xee>(ab, cd);
            let (ab, cd) = (high(halves[half], halves[half + 1]), high(halves[half + 2], halves[half + 3]));
            columns[half + 2] = _mm256_shuffle_ps::<0x44>(ab, cd);
            columns[half + 3] = _mm256_shuffle_ps::<0xee>(ab, cd);
        }
        columns
    }
}
