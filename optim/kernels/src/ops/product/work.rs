//! The part of a product that a kernel computes, and the update of the output with a sum.

use super::vectors::Vectors;

/// A product, or a part of one, with a row-major output.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    /// Output; its columns are contiguous.
    pub out: *mut f32,
    pub out_stride: usize,
    /// True if the product is added to the output.
    pub add: bool,
    pub factor: f32,
    pub a: *const f32,
    /// Strides from one row to the next, and from one depth to the next.
    pub a_strides: [usize; 2],
    pub b: *const f32,
    /// Strides from one depth to the next, and from one column to the next.
    pub b_strides: [usize; 2],
}

impl Work {
    /// The same product of transposed inputs, for an output with contiguous rows.
    pub fn transposed(self, out_stride: usize) -> Self {
        let ([row, a_depth], [b_depth, column]) = (self.a_strides, self.b_strides);
        Self {
            rows: self.columns,
            columns: self.rows,
            out_stride,
            a: self.b,
            a_strides: [column, b_depth],
            b: self.a,
            b_strides: [a_depth, row],
            ..self
        }
    }
}

/// Writes `count` elements of `factor * sum`, or adds them.
#[inline(always)]
pub(super) unsafe fn finish<V: Vectors>(out: *mut f32, sum: V::Vector, count: usize, add: bool, factor: V::Vector) {
    // SAFETY: the caller guarantees `count` elements of the output.
    unsafe {
        let whole = count == V::WIDTH;
        let value = match (add, whole) {
            (false, _) => V::multiply(sum, factor),
            (true, true) => V::multiply_add(sum, factor, V::load(out)),
            (true, false) => V::multiply_add(sum, factor, V::load_part(out, count)),
        };
        match whole {
            true => V::store(out, value),
            false => V::store_part(out, value, count),
        }
    }
}
