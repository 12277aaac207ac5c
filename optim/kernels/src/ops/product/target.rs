//! Matrices in memory, and the kernels that compute products of them.

use std::sync::atomic::{AtomicUsize, Ordering};

use burn::backend::TensorMetadata;
use burn_flex::FlexTensor;
use gemm::Parallelism;
use rayon::prelude::*;

use super::parts::{FEW, Part, Parts};
#[cfg(target_arch = "x86_64")]
use super::{tiles, work};
#[cfg(target_arch = "x86_64")]
use crate::instructions::InstructionSet;
use crate::ops::flex::contiguous;

/// Returns true if a product takes so long that another thread wakes up before it is done. One of few rows waits for memory.
pub(super) fn is_long(rows: usize, columns: usize, depth: usize) -> bool {
    rows * columns * depth >= if rows <= FEW { 1 << 17 } else { 1 << 21 }
}

/// Calls a function with every number below `count` on all threads. For products of few rows this thread is one of them: they would be done before it
/// has slept and woken up. For others it is not, since every thread that packs inputs keeps memory for them.
pub(super) fn each(count: usize, rows: usize, make: impl Fn(usize) + Send + Sync) {
    if rows > FEW {
        return (0..count).into_par_iter().for_each(make);
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let taken = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        taken.take_while(|number| *number < count).for_each(&make);
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..count.min(rayon::current_num_threads()) {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// A matrix in memory: element `(r, c)` is at `r * row_stride + c * column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<T> {
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

    /// The transposed matrix in the same memory.
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
    pub(super) fn extent(&self) -> usize {
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
        let [row_stride, column_stride] = strides(x);
        let data = &x.storage::<f32>()[x.layout().start_offset()..];
        Self { data, rows, columns, row_stride, column_stride }
    }
}

/// Strides of rows and columns of a tensor that [`readable`] gave.
pub(super) fn strides(x: &FlexTensor) -> [usize; 2] {
    match *x.layout().strides() {
        // The stride of a single row or column means nothing, and may be below zero.
        [row, column] => {
            [(x.shape()[0], row), (x.shape()[1], column)].map(|(size, stride)| match usize::try_from(stride) {
                Ok(stride) => stride,
                Err(_) if size < 2 => 0,
                Err(_) => unreachable!("the tensor was made readable"),
            })
        }
        _ => unreachable!("a matrix has two dimensions"),
    }
}

/// A matrix that products can read: as it is, rows or columns one after another, or else a copy.
pub(crate) fn readable(x: FlexTensor) -> FlexTensor {
    match *x.layout().strides() {
        [row, column] if (column == 1 && row >= 0) || (row == 1 && column >= 0) => x,
        _ => contiguous(x),
    }
}

/// Kernel that computes a part of a product.
#[derive(Clone, Copy)]
pub(super) enum Kernel {
    /// Ours, for this instruction set, optionally for the transposed product, whose output is row-major.
    #[cfg(target_arch = "x86_64")]
    Tiles { wide: bool, transposed: bool },
    /// That of `gemm`.
    Gemm,
}

impl Kernel {
    /// The best for an output with these strides.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(super) fn here([row_stride, column_stride]: [usize; 2], [rows, columns]: [usize; 2]) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let set = crate::instructions::instruction_set();
            let row_major = column_stride == 1 || columns == 1 && row_stride != 1;
            if set >= InstructionSet::Avx2 && (row_major || row_stride == 1) {
                // Half of a wide vector would be unused.
                let narrow = if row_major { columns } else { rows } <= 8;
                return Self::Tiles { wide: set == InstructionSet::Avx512 && !narrow, transposed: !row_major };
            }
        }
        Self::Gemm
    }

    fn parts(self, rows: usize, columns: usize, threads: usize) -> Parts {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Tiles { transposed: false, .. } => Parts::of_tiles(rows, columns, threads),
            #[cfg(target_arch = "x86_64")]
            Self::Tiles { transposed: true, .. } => Parts::of_tiles(columns, rows, threads).transposed(),
            Self::Gemm => Parts::of_gemm(rows, columns, threads),
        }
    }
}

/// Arguments of [`multiply`].
pub(super) struct Target<'a> {
    pub out: *mut f32,
    pub strides: [usize; 2],
    pub add: bool,
    pub factor: f32,
    pub a: Matrix<&'a [f32]>,
    pub b: Matrix<&'a [f32]>,
    pub kernel: Kernel,
}

// SAFETY: threads write through the pointer in parts of the output that have no element in common.
unsafe impl Sync for Target<'_> {}

impl Target<'_> {
    /// # Safety
    ///
    /// As for [`multiply`], whose assertions hold.
    pub(super) unsafe fn make_all(&self, parallel: bool) {
        let (rows, columns) = (self.a.rows, self.b.columns);
        if rows == 0 || columns == 0 {
            return;
        }
        let threads = match parallel && is_long(rows, columns, self.a.columns) {
            true => rayon::current_num_threads(),
            false => 1,
        };
        let parts = self.kernel.parts(rows, columns, threads);
        let parallelism = if threads > 1 && parts.count() == 1 { Parallelism::Rayon(0) } else { Parallelism::None };
        let make = |number: usize| {
            // SAFETY: the parts make up the output and have no element in common; the caller guarantees the rest.
            unsafe { self.make(parts.part(number), parallelism) }
        };
        match parts.count() {
            1 => make(0),
            count => each(count, rows, make),
        }
    }

    /// # Safety
    ///
    /// As for [`multiply`], and no other thread may access this part of the output.
    #[cfg_attr(not(target_arch = "x86_64"), allow(irrefutable_let_patterns))]
    unsafe fn make(&self, part: Part, parallelism: Parallelism) {
        let Self { out, strides: [row_stride, column_stride], add, factor, a, b, kernel } = *self;
        let ([top, bottom], [left, right]) = (part.rows, part.columns);
        // SAFETY: every index `r * row_stride + c * column_stride` of the inputs is below their extents, which are within the slices (asserted
        // by the only caller), also from a first row or column on; the caller guarantees the output. Kernels are chosen by the processor.
        unsafe {
            let out = out.add(top * row_stride + left * column_stride);
            let first = a.data.as_ptr().wrapping_add(top * a.row_stride);
            let second = b.data.as_ptr().wrapping_add(left * b.column_stride);
            #[cfg(target_arch = "x86_64")]
            if let Kernel::Tiles { wide, transposed } = kernel {
                let work = work::Work {
                    rows: bottom - top,
                    columns: right - left,
                    depth: a.columns,
                    out,
                    out_stride: row_stride,
                    add,
                    factor,
                    a: first,
                    a_strides: [a.row_stride, a.column_stride],
                    b: second,
                    b_strides: [b.row_stride, b.column_stride],
                };
                let work = if transposed { work.transposed(column_stride) } else { work };
                return if wide { tiles::avx512(work) } else { tiles::avx2(work) };
            }
            gemm::gemm(
                bottom - top,
                right - left,
                a.columns,
                out,
                column_stride as isize,
                row_stride as isize,
                add,
                first,
                a.column_stride as isize,
                a.row_stride as isize,
                second,
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
