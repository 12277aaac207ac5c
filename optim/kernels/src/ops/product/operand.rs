//! Right-hand matrices of products, in f32 or narrower: a product reads narrow ones a panel at a time, which each thread widens for itself.

use std::cell::RefCell;

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::lines::Lines;
use super::narrow::{Narrow, Values};
use super::parts::{DEPTH, FEW};
#[cfg(target_arch = "x86_64")]
use super::q8_0;
use super::target::{Kernel, Matrix, Target, each, is_long, strides};
use crate::narrow::view;
use crate::ops::flex::tensor;

/// Columns of a panel at most: with its depth it stays in the second-level cache.
const COLUMNS: usize = 512;
/// The same for products of few rows, which use every value a few times at most: they read it again from the first-level cache.
const COLUMNS_OF_FEW: usize = 32;

/// Right-hand matrix of a product.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// In f32.
    Wide(Matrix<&'a [f32]>),
    /// In fewer bytes.
    Narrow(Narrow<'a>),
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
            let narrow = Narrow { data: Values::Codes(view), rows, columns, row_stride, column_stride };
            return Self::Narrow(if transposed { narrow.transposed() } else { narrow });
        }
        let start = x.layout().start_offset();
        let data = match x.dtype() {
            DType::BF16 => Values::Bf16(&x.storage()[start..]),
            DType::F16 => Values::F16(&x.storage()[start..]),
            _ => return Self::Wide(Matrix::of(x)),
        };
        let [row_stride, column_stride] = strides(x);
        Self::Narrow(Narrow { data, rows: x.shape()[0], columns: x.shape()[1], row_stride, column_stride })
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
    columns.for_each(|(column, to)| narrow.pieces(column * narrow.column_stride, 0, to.len(), to, to.len()));
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
    let few = a.rows <= FEW;
    let ours = few && !matches!(Kernel::here(strides, [a.rows, b.columns]), Kernel::Gemm);
    // Few rows wait for memory, of which long pieces are read faster.
    let tasks = match few {
        true => b.columns.div_ceil(COLUMNS).next_multiple_of(rayon::current_num_threads()),
        false => 8,
    };
    let width = b.columns.div_ceil(tasks.max(1)).next_multiple_of(32).clamp(64, COLUMNS);
    let output = Output(out);
    let narrower = if few { COLUMNS_OF_FEW } else { width };
    let make = |number: usize| {
        let end = ((number + 1) * width).min(b.columns);
        PANEL.with_borrow_mut(|panel| {
            // SAFETY: the columns lie within the output and no other task has them; the caller guarantees the rest.
            let out = unsafe { output.at(number * width * strides[1]) };
            #[cfg(target_arch = "x86_64")]
            if ours
                && a.column_stride == 1
                && let Some(blocks) = b.columns_of_q8_0(strides)
            {
                let part = q8_0::Columns {
                    out,
                    out_stride: strides[0],
                    add,
                    factor,
                    a: a.data.as_ptr(),
                    a_stride: a.row_stride,
                    rows: a.rows,
                    depth: b.rows,
                    blocks,
                    columns: number * width..end,
                };
                // SAFETY: as above, and the kernels are those of a processor with these instructions.
                return unsafe { part.multiply() };
            }
            if ours && b.column_stride == 1 {
                let part = Lines { out, strides, add, factor, a, b, columns: number * width..end };
                // SAFETY: as above.
                return unsafe { part.multiply(panel) };
            }
            for left in (number * width..end).step_by(narrower) {
                let columns = left..(left + narrower).min(end);
                let mut first = 0;
                // At least once: an empty sum is 0.
                while first < b.rows || first == 0 {
                    let depth = first..(first + DEPTH).min(b.rows);
                    let data = &a.data[(first * a.column_stride).min(a.data.len())..];
                    let a = Matrix { data, columns: depth.len(), ..a };
                    let b = b.panel(depth, columns.clone(), panel);
                    let kernel = Kernel::here(strides, [a.rows, b.columns]);
                    // SAFETY: the columns lie within the output and no other task has them; the caller guarantees the rest.
                    unsafe {
                        let out = output.at(left * strides[1]);
                        Target { out, strides, add: add || first > 0, factor, a, b, kernel }.make_all(false);
                    }
                    first += DEPTH;
                }
            }
        });
    };
    let count = b.columns.div_ceil(width);
    match parallel && is_long(a.rows, b.columns, b.rows) {
        true => each(count, a.rows, make),
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
    use crate::narrow::ggml::Blocks;
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
            let mut stored = vec![
                Codes::Groups(quantise_groups(&values, 8, 64, Rounding::Nearest), 64),
                Codes::FourBit(FourBit::nf4(&values, 64)),
                Codes::FourBit(FourBit::nf4(&values, 32).double()),
            ];
            if values.len().is_multiple_of(32) {
                stored.push(Codes::Blocks(Blocks::q8_0(&values)));
            }
            for codes in stored {
                all.push(carrier(&PackedMatrix { shape, transposed, codes }, &device));
            }
        }
        all
    }

    #[test]
    fn products_with_narrow_matrices_have_the_bits_of_those_with_widened_ones() {
        let sizes = [[1, 700, 90], [3, 64, 1100], [40, 1030, 300], [200, 33, 7], [5, 1, 1]];
        let few = [[1, 1056, 70], [2, 512, 7], [4, 544, 33], [3, 1030, 1090], [1, 8, 1500], [2, 100, 530]];
        for [rows, d_in, d_out] in sizes.into_iter().chain(few) {
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
