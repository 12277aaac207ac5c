//! Matrices of products in fewer bytes than f32.

use std::ops::Range;

use super::target::Matrix;
#[cfg(target_arch = "x86_64")]
use crate::narrow::ggml::BlockType;
use crate::narrow::{View, bf16, f16};
use crate::ops::flex::vectorised;

/// A matrix in fewer bytes than f32, with contiguous rows or columns.
pub(crate) type Narrow<'a> = Matrix<Values<'a>>;

/// Values in fewer bytes than f32.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    Bf16(&'a [burn::tensor::bf16]),
    F16(&'a [burn::tensor::f16]),
    Codes(View<'a>),
}

impl Narrow<'_> {
    /// The blocks of a matrix of whole columns in `Q8_0`, for an output with these strides.
    #[cfg(target_arch = "x86_64")]
    pub fn columns_of_q8_0(&self, [_, column_stride]: [usize; 2]) -> Option<&[u8]> {
        let Values::Codes(view) = &self.data else { return None };
        let whole = self.row_stride == 1
            && self.column_stride == self.rows
            && self.rows.is_multiple_of(BlockType::Q8_0.values());
        if whole && column_stride == 1 { view.q8_0() } else { None }
    }

    /// Pieces of `length` values that follow each other in memory, each `stride` behind the one before, to places of `room` values.
    pub fn pieces(&self, first: usize, stride: usize, length: usize, to: &mut [f32], room: usize) {
        vectorised(
            #[inline(always)]
            || {
                for (number, to) in to.chunks_exact_mut(room.max(1)).enumerate() {
                    let (first, to) = (first + number * stride, &mut to[..length]);
                    match self.data {
                        Values::Bf16(values) => {
                            for (to, from) in to.iter_mut().zip(&values[first..first + length]) {
                                *to = from.widened();
                            }
                        }
                        Values::F16(values) => {
                            for (to, from) in to.iter_mut().zip(&values[first..first + length]) {
                                *to = from.widened();
                            }
                        }
                        Values::Codes(view) => view.restore(first, to),
                    }
                }
            },
        );
    }

    /// A row in f32.
    pub fn row(&self, row: usize, to: &mut [f32]) {
        let first = row * self.row_stride;
        match self.column_stride == 1 || self.columns == 1 {
            true => self.pieces(first, 0, to.len(), to, to.len()),
            false => self.pieces(first, self.column_stride, 1, to, 1),
        }
    }

    /// A part in f32, in the order of the memory.
    pub fn panel<'b>(&self, rows: Range<usize>, columns: Range<usize>, to: &'b mut Vec<f32>) -> Matrix<&'b [f32]> {
        let (depth, width) = (rows.len(), columns.len());
        if to.len() < depth * width {
            to.resize(depth * width, 0.0);
        }
        let to = &mut to[..depth * width];
        let first = rows.start * self.row_stride + columns.start * self.column_stride;
        if self.column_stride == 1 || self.columns == 1 {
            self.pieces(first, self.row_stride, width, to, width);
            return Matrix::row_major(&*to, depth, width);
        }
        self.pieces(first, self.column_stride, depth, to, depth);
        Matrix::row_major(&*to, width, depth).transposed()
    }
}

/// Values of a type, read in f32.
pub(super) trait Widened: Copy {
    fn widened(self) -> f32;
}

impl Widened for f32 {
    #[inline(always)]
    fn widened(self) -> f32 {
        self
    }
}

impl Widened for burn::tensor::bf16 {
    #[inline(always)]
    fn widened(self) -> f32 {
        bf16::widened(self.to_bits())
    }
}

impl Widened for burn::tensor::f16 {
    #[inline(always)]
    fn widened(self) -> f32 {
        f16::widened(self.to_bits())
    }
}
