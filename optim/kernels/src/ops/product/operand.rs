//! Right-hand matrices of products, in f32 or narrower: a product reads narrow ones a panel at a time, which each thread widens for itself.

use std::cell::RefCell;
use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::tensor::{DType, bf16, f16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::target::{Kernel, Matrix, SMALL, Target, strides};
use crate::narrow::{View, view};
use crate::ops::flex::{tensor, vectorised};

/// Depth of a panel: that up to which kernels add products before they touch the output, so that panels give the bits of the whole.
const DEPTH: usize = 512;
/// Columns of a panel at most: with its depth it stays in the second-level cache.
const COLUMNS: usize = 512;

/// Right-hand matrix of a product.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// In f32.
    Wide(Matrix<&'a [f32]>),
    /// In fewer bytes.
    Narrow(Narrow<'a>),
}

/// A matrix in fewer bytes than f32, with contiguous rows or columns.
#[derive(Clone, Copy)]
pub(crate) struct Narrow<'a> {
    values: Values<'a>,
    pub rows: usize,
    pub columns: usize,
    row_stride: usize,
    column_stride: usize,
}

#[derive(Clone, Copy)]
enum Values<'a> {
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    Codes(View<'a>),
}

impl<'a> From<Matrix<&'a [f32]>> for Operand<'a> {
    fn from(matrix: Matrix<&'a [f32]>) -> Self {
        Self::Wide(matrix)
    }
}

impl<'a> Operand<'a> {
    /// A weight `[rows, columns]` that [`super::target::readable`] gave: in f32, bf16, f16 or codes.
    pub fn of(x: &'a FlexTensor) -> Self {
        if let Some((view, transposed)) = view(x) {
            let [rows, columns] = view.shape;
            let (row_stride, column_stride) = if view.transposed { (1, rows) } else { (columns, 1) };
            let narrow = Narrow { values: Values::Codes(view), rows, columns, row_stride, column_stride };
            return Self::Narrow(if transposed { narrow.transposed() } else { narrow });
        }
        let start = x.layout().start_offset();
        let values = match x.dtype() {
            DType::BF16 => Values::Bf16(&x.storage::<bf16>()[start..]),
            DType::F16 => Values::F16(&x.storage::<f16>()[start..]),
            _ => return Self::Wide(Matrix::of(x)),
        };
        let [row_stride, column_stride] = strides(x);
        Self::Narrow(Narrow { values, rows: x.shape()[0], columns: x.shape()[1], row_stride, column_stride })
    }

    /// The transposed matrix in the same memory.
    pub fn transposed(self) -> Self {
        match self {
            Self::Wide(matrix) => Self::Wide(matrix.transposed()),
            Self::Narrow(narrow) => Self::Narrow(narrow.transposed()),
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Self::Wide(matrix) => matrix.rows,
            Self::Narrow(narrow) => narrow.rows,
        }
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        match self {
            Self::Wide(matrix) => matrix.columns,
            Self::Narrow(narrow) => narrow.columns,
        }
    }

    /// A row in f32.
    pub fn row(&self, row: usize, to: &mut [f32]) {
        match self {
            Self::Wide(m) if m.column_stride == 1 => to.copy_from_slice(&m.data[row * m.row_stride..][..m.columns]),
            Self::Wide(m) => {
                let values = m.data[row * m.row_stride..].iter().step_by(m.column_stride);
                to.iter_mut().zip(values).for_each(|(to, value)| *to = *value);
            }
            Self::Narrow(narrow) => narrow.row(row, to),
        }
    }

    /// Returns true if the columns lie one after another, as in a transposed view.
    pub fn is_transposed(&self) -> bool {
        let column_stride = match self {
            Self::Wide(matrix) => matrix.column_stride,
            Self::Narrow(narrow) => narrow.column_stride,
        };
        column_stride > 1
    }
}

impl Narrow<'_> {
    fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Values that follow each other in memory.
    fn line(&self, first: usize, to: &mut [f32]) {
        match self.values {
            Values::Bf16(values) => {
                let from = &values[first..first + to.len()];
                vectorised(
                    #[inline(always)]
                    || {
                        for (to, from) in to.iter_mut().zip(from) {
                            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
                        }
                    },
                );
            }
            Values::F16(values) => {
                to.iter_mut().zip(&values[first..]).for_each(|(to, from)| *to = from.to_f32());
            }
            Values::Codes(view) => vectorised(
                #[inline(always)]
                || view.restore(first, to),
            ),
        }
    }

    fn row(&self, row: usize, to: &mut [f32]) {
        if self.column_stride == 1 || self.columns == 1 {
            return self.line(row * self.row_stride, to);
        }
        for (column, to) in to.iter_mut().enumerate() {
            self.line(row * self.row_stride + column * self.column_stride, std::slice::from_mut(to));
        }
    }

    /// A part in f32, in the order of the memory.
    fn panel<'b>(&self, rows: Range<usize>, columns: Range<usize>, to: &'b mut Vec<f32>) -> Matrix<&'b [f32]> {
        let (depth, width) = (rows.len(), columns.len());
        to.resize((DEPTH * COLUMNS).max(depth * width), 0.0);
        let to = &mut to[..depth * width];
        if self.column_stride == 1 || self.columns == 1 {
            for (row, to) in rows.zip(to.chunks_exact_mut(width)) {
                self.line(row * self.row_stride + columns.start * self.column_stride, to);
            }
            return Matrix::row_major(&*to, depth, width);
        }
        for (column, to) in columns.zip(to.chunks_exact_mut(depth)) {
            self.line(rows.start * self.row_stride + column * self.column_stride, to);
        }
        Matrix::row_major(&*to, width, depth).transposed()
    }
}

/// All values of a weight in f32, row-major.
pub(crate) fn widened(x: &FlexTensor) -> FlexTensor {
    let narrow = match Operand::of(x) {
        Operand::Narrow(narrow) => narrow,
        Operand::Wide(_) => return x.clone(),
    };
    let shape = [narrow.rows, narrow.columns];
    let mut values = vec![0.0; narrow.rows * narrow.columns];
    if narrow.column_stride == 1 || narrow.columns == 1 {
        let rows = values.par_chunks_mut(narrow.columns.max(1)).enumerate();
        rows.for_each(|(row, to)| narrow.row(row, to));
        return tensor(values, shape);
    }
    let columns = values.par_chunks_mut(narrow.rows.max(1)).enumerate();
    columns.for_each(|(column, to)| narrow.line(column * narrow.column_stride, to));
    tensor(values, [narrow.columns, narrow.rows]).transpose(0, 1).to_contiguous()
}

thread_local! {
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// [`super::multiply`] with a narrow matrix at the right.
///
/// # Safety
///
/// As for [`super::multiply`].
pub(super) unsafe fn multiply(
    out: *mut f32,
    strides: [usize; 2],
    add: bool,
    factor: f32,
    a: Matrix<&[f32]>,
    b: Narrow<'_>,
    parallel: bool,
) {
    assert!(a.columns == b.rows, "shapes of a product");
    assert!(a.extent() <= a.data.len(), "memory of a product");
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    // The partition does not depend on the number of threads.
    let width = b.columns.div_ceil(8).next_multiple_of(32).clamp(64, COLUMNS);
    let output = Output(out);
    let make = |number: usize| {
        let columns = number * width..((number + 1) * width).min(b.columns);
        PANEL.with_borrow_mut(|panel| {
            let mut first = 0;
            // At least once: an empty sum is 0.
            while first < b.rows || first == 0 {
                let depth = first..(first + DEPTH).min(b.rows);
                let a =
                    Matrix { data: &a.data[(first * a.column_stride).min(a.data.len())..], columns: depth.len(), ..a };
                let b = b.panel(depth, columns.clone(), panel);
                let kernel = Kernel::here(strides, [a.rows, b.columns]);
                // SAFETY: the columns lie within the output and no other task has them; the caller guarantees the rest.
                unsafe {
                    let out = output.at(columns.start * strides[1]);
                    Target { out, strides, add: add || first > 0, factor, a, b, kernel }.make_all(false);
                }
                first += DEPTH;
            }
        });
    };
    let count = b.columns.div_ceil(width);
    match parallel && a.rows * b.columns * b.rows >= SMALL {
        true => (0..count).into_par_iter().for_each(make),
        false => (0..count).for_each(make),
    }
}

/// Output of several tasks.
struct Output(*mut f32);

impl Output {
    /// # Safety
    ///
    /// The offset lies within the output.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: guaranteed by the caller.
        unsafe { self.0.add(offset) }
    }
}

// SAFETY: tasks write through the pointer in columns of the output that no other has.
unsafe impl Sync for Output {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::narrow::four_bit::FourBit;
    use crate::narrow::groups::{Rounding, quantise_groups};
    use crate::narrow::packed::{Codes, PackedMatrix, carrier};
    use crate::ops::check::random;
    use crate::ops::linear;
    use burn::tensor::{Device, Tensor, TensorData};

    /// The same matrix in every narrow form.
    fn forms(shape: [usize; 2], seed: u64) -> Vec<Tensor<2>> {
        let device = Device::default();
        let values = random(&shape, seed);
        let wide = Tensor::<2>::from_data(TensorData::new(values.clone(), shape), &device);
        let mut all = vec![wide.clone().cast(DType::BF16), wide.cast(DType::F16)];
        for transposed in [false, true] {
            for codes in [
                Codes::Groups(quantise_groups(&values, 8, 64, Rounding::Nearest), 64),
                Codes::FourBit(FourBit::nf4(&values, 64)),
                Codes::FourBit(FourBit::nf4(&values, 32).double()),
            ] {
                all.push(carrier(&PackedMatrix { shape, transposed, codes }, &device));
            }
        }
        all
    }

    #[test]
    fn products_with_narrow_matrices_have_the_bits_of_those_with_widened_ones() {
        for [rows, d_in, d_out] in [[1, 700, 90], [3, 64, 1100], [40, 1030, 300], [200, 33, 7], [5, 1, 1]] {
            let x = |columns: usize| {
                let values = random(&[rows, columns], 1);
                Tensor::<2>::from_data(TensorData::new(values, [rows, columns]), &Device::default())
            };
            for (number, weight) in forms([d_in, d_out], 2).into_iter().enumerate() {
                let wide = crate::ops::widened(weight.clone());
                assert_eq!(wide.dtype(), DType::F32);
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let same = |a: Tensor<2>, b: Tensor<2>| {
                        let [a, b] = [a, b].map(|y| y.into_data().try_into_vec::<f32>().unwrap());
                        assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "form {number}");
                    };
                    pool.install(|| {
                        same(linear(x(d_in), weight.clone()), linear(x(d_in), wide.clone()));
                        let (turned, wide) = (weight.clone().transpose(), wide.clone().transpose());
                        same(linear(x(d_out), turned), linear(x(d_out), wide));
                    });
                }
            }
        }
    }

    #[test]
    fn gradients_of_narrow_weights_are_wide_and_those_of_codes_are_none() {
        for weight in forms([40, 24], 3) {
            let x = Tensor::<2>::from_data(TensorData::new(random(&[6, 40], 1), [6, 40]), &Device::default());
            let run = |weight: Tensor<2>, learns: bool| {
                let weight = Tensor::from_inner(weight);
                let weight = if learns { weight.require_grad() } else { weight };
                let x = x.clone().autodiff().require_grad();
                let mut grads = linear(x.clone(), weight.clone()).square().sum().backward();
                (x.grad_remove(&mut grads).unwrap(), weight.grad_remove(&mut grads))
            };
            let wide = crate::ops::widened(weight.clone());
            for learns in [false, true] {
                let ((dx, dw), (wide_dx, wide_dw)) = (run(weight.clone(), learns), run(wide.clone(), learns));
                dx.into_data().assert_eq(&wide_dx.into_data(), true);
                assert_eq!(dw.is_some(), learns);
                if let (Some(dw), Some(wide_dw)) = (dw, wide_dw) {
                    dw.into_data().assert_eq(&wide_dw.into_data(), true);
                }
            }
        }
    }
}
