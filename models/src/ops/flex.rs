//! What the fused operations share: access to the CPU backend's memory, products, exponentials.
//!
//! Loops run on fixed partitions and partial sums are added in order: results do not depend on the number of threads.

use std::sync::atomic::Ordering;

use burn::backend::DispatchDevice;
use burn::tensor::{Bytes, DType, Device, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};
use pulp::Arch;

/// Rows that one task of a parallel loop takes.
pub(super) const ROWS: usize = 64;

/// Whether tensors of this device live in the CPU backend's memory.
pub(super) fn on_flex(device: &Device) -> bool {
    match device.as_dispatch() {
        DispatchDevice::Flex(_) => true,
        DispatchDevice::Autodiff(_) => on_flex(&device.clone().inner()),
        #[allow(unreachable_patterns)] // other backends exist in builds with their features
        _ => false,
    }
}

/// Whether the fused form can take this tensor.
pub(super) fn fits<const D: usize>(x: &Tensor<D>) -> bool {
    super::FUSED.load(Ordering::Relaxed) && x.dtype() == DType::F32 && on_flex(&x.device())
}

/// The values in row-major order; copies when the tensor is a view with another order.
pub(super) fn contiguous(x: FlexTensor) -> FlexTensor {
    match x.is_contiguous() {
        true => x,
        false => x.to_contiguous(),
    }
}

/// Values of a tensor that [`contiguous`] gave.
pub(super) fn values(x: &FlexTensor) -> &[f32] {
    match x.as_slice::<f32>() {
        Some(values) => values,
        None => unreachable!("the tensor was made contiguous and its type was checked"),
    }
}

/// A tensor of values in row-major order.
pub(super) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape.into()), DType::F32)
}

/// Runs a loop compiled for the widest vectors that this processor has.
///
/// The closure must be `#[inline(always)]`: a closure that stays a function of its own is compiled for the oldest processors, where a fused
/// multiplication and addition is a call.
pub(super) fn vectorised<R>(run: impl FnOnce() -> R) -> R {
    struct Run<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Run<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            self.0()
        }
    }
    Arch::new().dispatch(Run(run))
}

/// `exp` to within 2e-7 of itself, without branches; what would be a denormal number is 0, and above 88.3 the result stays at its largest.
///
/// The polynomial of the Cephes library after taking out a power of two.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.3, 88.3);
    let power = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let rest = power.mul_add(-0.693_359_4, clamped);
    let rest = power.mul_add(2.121_944_4e-4, rest);
    let mut sum = 1.987_569_1e-4f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        sum = sum.mul_add(rest, coefficient);
    }
    let sum = (sum * rest).mul_add(rest, rest) + 1.0;
    let scale = f32::from_bits(((power as i32 + 127) << 23) as u32);
    if x < -87.3 { 0.0 } else { sum * scale }
}

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
/// # Safety
///
/// The output must be writable at every index that its size and strides give, overlap with no input, and be initialised when `add`.
unsafe fn multiply(
    out: *mut f32,
    [row_stride, column_stride]: [usize; 2],
    add: bool,
    factor: f32,
    a: Matrix<&[f32]>,
    b: Matrix<&[f32]>,
    parallel: bool,
) {
    assert!(a.columns == b.rows, "shapes of a product");
    assert!(a.extent() <= a.data.len() && b.extent() <= b.data.len(), "memory of a product");
    let parallelism = match parallel {
        true => gemm::Parallelism::Rayon(0),
        false => gemm::Parallelism::None,
    };
    // SAFETY: every index `r * row_stride + c * column_stride` of the inputs is below their extents, which are within the slices (asserted
    // above); the caller answers for the output.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            column_stride as isize,
            row_stride as isize,
            add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_close_everywhere() {
        for i in -870..880 {
            let x = i as f32 * 0.1 + 0.013;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / exact - 1.0).abs() < 2e-7, "{x}: {ours} {exact}");
        }
        assert_eq!([exp(0.0), exp(-1e30), exp(-88.0)], [1.0, 0.0, 0.0]);
        assert!(exp(1e30).is_finite());
    }

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
}
