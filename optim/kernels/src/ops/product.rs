//! Matrix products on the CPU.

use burn::backend::TensorMetadata;
use burn_flex::FlexTensor;
use gemm::Parallelism;
use rayon::prelude::*;

use super::flex::contiguous;

/// Rows of an output that a thread takes at least. For many rows or columns the order of additions does not depend on how many there are; for a
/// few it would.
const ROWS: usize = 96;
/// Columns of an output that a thread takes at least.
const COLUMNS: usize = 512;
/// A product of fewer multiplications is done before another thread would have woken up.
const SMALL: usize = 1 << 21;

/// A matrix in memory: value `(r, c)` stands at `r * row_stride + c * column_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<T> {
    pub data: T,
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<T> Matrix<T> {
    /// Rows one after another.
    pub fn row_major(data: T, rows: usize, columns: usize) -> Self {
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// The same memory read the other way.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            data: self.data,
        }
    }

    /// Number of values from the first to the last.
    fn extent(&self) -> usize {
        match self.rows * self.columns {
            0 => 0,
            _ => (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1,
        }
    }
}

impl<'a> Matrix<&'a [f32]> {
    /// The values of a tensor `[rows, columns]` that [`readable`] gave.
    pub fn of(x: &'a FlexTensor) -> Self {
        let (rows, columns) = (x.shape()[0], x.shape()[1]);
        let [row_stride, column_stride] = match *x.layout().strides() {
            // The stride of a single row or column means nothing, and may be below zero.
            [row, column] => [(rows, row), (columns, column)].map(|(size, stride)| match usize::try_from(stride) {
                Ok(stride) => stride,
                Err(_) if size < 2 => 0,
                Err(_) => unreachable!("the tensor was made readable"),
            }),
            _ => unreachable!("a matrix has two dimensions"),
        };
        let data = &x.storage::<f32>()[x.layout().start_offset()..];
        Self { data, rows, columns, row_stride, column_stride }
    }
}

/// A matrix that products can read: as it is, rows or columns one after another, or else a copy.
pub(super) fn readable(x: FlexTensor) -> FlexTensor {
    match *x.layout().strides() {
        [row, column] if (column == 1 && row >= 0) || (row == 1 && column >= 0) => x,
        _ => contiguous(x),
    }
}

/// `out = factor * a b`, or `out += factor * a b` when `add`. With `parallel` all threads work on it.
pub(super) fn product(
    out: Matrix<&mut [f32]>,
    add: bool,
    factor: f32,
    a: Matrix<&[f32]>,
    b: Matrix<&[f32]>,
    parallel: bool,
) {
    assert!(out.rows == a.rows && out.columns == b.columns, "shapes of a product");
    assert!(out.extent() <= out.data.len(), "memory of a product");
    assert!(out.row_stride >= out.columns || out.column_stride >= out.rows, "values of a product must not overlap");
    // SAFETY: the output lies within its slice, which is borrowed mutably, so it overlaps with no input.
    unsafe { multiply(out.data.as_mut_ptr(), [out.row_stride, out.column_stride], add, factor, a, b, parallel) }
}

/// `factor * a b` row-major, in fresh memory that nobody cleared.
pub(super) fn multiplied(factor: f32, a: Matrix<&[f32]>, b: Matrix<&[f32]>) -> Vec<f32> {
    let count = a.rows * b.columns;
    let mut out = Vec::with_capacity(count);
    // SAFETY: the output has room for its rows one after another and belongs to nobody else; without `add` all of its values are written and
    // none is read, so they are initialised when the length is set.
    unsafe {
        multiply(out.as_mut_ptr(), [b.columns, 1], false, factor, a, b, true);
        out.set_len(count);
    }
    out
}

/// [`product`] with an output of the rows of `a` and the columns of `b`, in memory with these strides of rows and columns.
///
/// Every thread makes a part of the output by itself: packing its inputs anew costs less than meeting the others after each step.
///
/// # Safety
///
/// The output must be writable at every index that its size and strides give, overlap with no input, and be initialised when `add`.
unsafe fn multiply(
    out: *mut f32,
    strides: [usize; 2],
    add: bool,
    factor: f32,
    a: Matrix<&[f32]>,
    b: Matrix<&[f32]>,
    parallel: bool,
) {
    assert!(a.columns == b.rows, "shapes of a product");
    assert!(a.extent() <= a.data.len() && b.extent() <= b.data.len(), "memory of a product");
    let (rows, columns) = (a.rows, b.columns);
    let threads = match parallel && rows * columns * a.columns >= SMALL {
        true => rayon::current_num_threads(),
        false => 1,
    };
    // Outputs of few values add up in another order than others.
    let by_rows = if columns >= 8 { threads.min(rows / ROWS) } else { 1 };
    let by_columns = threads.min(columns / COLUMNS);
    let (row_parts, column_parts) = match by_columns > 1 && (by_rows < 2 || columns > 8 * rows) {
        true => (1, by_columns),
        false => (by_rows.max(1), 1),
    };
    let parts = row_parts * column_parts;
    let parallelism = if threads > 1 && parts == 1 { Parallelism::Rayon(0) } else { Parallelism::None };
    let target = Target { out, strides, add, factor, a, b };
    let make = |number: usize| {
        let cut = |size: usize, count: usize, number: usize| [number, number + 1].map(|number| size * number / count);
        let (row, column) = (number / column_parts, number % column_parts);
        let part = Part { rows: cut(rows, row_parts, row), columns: cut(columns, column_parts, column) };
        // SAFETY: the parts make up the output and have no value in common; the caller answers for the rest.
        unsafe { target.make(part, parallelism) }
    };
    match parts {
        1 => make(0),
        _ => (0..parts).into_par_iter().for_each(make),
    }
}

/// A part of an output: first row and column, and those after the last.
struct Part {
    rows: [usize; 2],
    columns: [usize; 2],
}

/// What [`multiply`] was asked for.
struct Target<'a> {
    out: *mut f32,
    strides: [usize; 2],
    add: bool,
    factor: f32,
    a: Matrix<&'a [f32]>,
    b: Matrix<&'a [f32]>,
}

// SAFETY: threads write through the pointer in parts of the output that have no value in common.
unsafe impl Sync for Target<'_> {}

impl Target<'_> {
    /// # Safety
    ///
    /// As for [`multiply`], and nobody else may be at this part of the output.
    unsafe fn make(&self, part: Part, parallelism: Parallelism) {
        let Self { out, strides: [row_stride, column_stride], add, factor, a, b } = *self;
        let ([top, bottom], [left, right]) = (part.rows, part.columns);
        // SAFETY: every index `r * row_stride + c * column_stride` of the inputs is below their extents, which are within the slices (asserted
        // by the only caller), also from a first row or column on; the caller answers for the output.
        unsafe {
            gemm::gemm(
                bottom - top,
                right - left,
                a.columns,
                out.add(top * row_stride + left * column_stride),
                column_stride as isize,
                row_stride as isize,
                add,
                a.data.as_ptr().wrapping_add(top * a.row_stride),
                a.column_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr().wrapping_add(left * b.column_stride),
                b.column_stride as isize,
                b.row_stride as isize,
                1.0,
                factor,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::random;

    #[test]
    fn products_take_any_strides() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 2.0, -1.0, 0.5, 3.0]);
        let mut out = [10.0; 4];
        let (left, right) = (Matrix::row_major(&a[..], 2, 3), Matrix::row_major(&b[..], 2, 3).transposed());
        product(Matrix::row_major(&mut out[..], 2, 2), false, 1.0, left, right, false);
        assert_eq!(out, [7.0, 9.0 - 0.0 - 1.0 + 1.0, 16.0, 16.5]);
        product(Matrix::row_major(&mut out[..], 2, 2).transposed(), true, 2.0, left, right, true);
        assert_eq!(multiplied(2.0, left, right), [14.0, 18.0, 32.0, 33.0]);
        assert_eq!(out, [7.0 + 14.0, 9.0 + 32.0, 16.0 + 18.0, 16.5 + 33.0]);
    }

    #[test]
    fn parts_give_the_bits_of_the_whole() {
        // Few and many rows, odd sizes, long sums, wide and tall outputs, each as stored, turned, and with the output turned.
        for [rows, depth, columns] in [
            [200, 700, 40],
            [193, 1100, 33],
            [384, 96, 512],
            [96, 64, 1537],
            [1, 700, 5000],
            [7, 512, 4099],
            [300, 8000, 2],
        ] {
            let (a, b) = (random(&[rows * depth], 1), random(&[depth * columns], 2));
            for flips in 0..8 {
                let flipped = |bit: usize| flips >> bit & 1 == 1;
                let run = |threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let read = |values, rows, columns, flip: bool| match flip {
                        true => Matrix::row_major(values, columns, rows).transposed(),
                        false => Matrix::row_major(values, rows, columns),
                    };
                    let (a, b) = (read(&a[..], rows, depth, flipped(0)), read(&b[..], depth, columns, flipped(1)));
                    let mut out = random(&[rows * columns], 3);
                    let to = match flipped(2) {
                        true => Matrix::row_major(&mut out[..], columns, rows).transposed(),
                        false => Matrix::row_major(&mut out[..], rows, columns),
                    };
                    pool.install(|| product(to, true, 0.7, a, b, true));
                    out
                };
                let one = run(1);
                for threads in [2, 3] {
                    assert!(one == run(threads), "{rows} x {depth} x {columns}, flips {flips}, {threads} threads");
                }
            }
        }
    }
}
