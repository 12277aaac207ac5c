//! Parts that fused operations share: access to the CPU backend's memory, exponentials.
//!
//! Loops run on fixed partitions and partial sums are added in order: results do not depend on the number of threads.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::backend::DispatchDevice;
use burn::tensor::{Bytes, DType, Device, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};
use rayon::prelude::*;

pub(super) use crate::vectorised::vectorised;

/// Rows that one task of a parallel loop processes.
pub(super) const ROWS: usize = 64;

/// Reports whether tensors of this device live in the CPU backend's memory.
pub(crate) fn on_flex(device: &Device) -> bool {
    match device.as_dispatch() {
        DispatchDevice::Flex(_) => true,
        DispatchDevice::Autodiff(_) => on_flex(&device.clone().inner()),
        #[allow(unreachable_patterns)] // other backends exist in builds with their features
        _ => false,
    }
}

/// Reports whether the fused form supports this tensor.
pub(super) fn fits<const D: usize>(x: &Tensor<D>) -> bool {
    super::fused::FUSED.load(Ordering::Relaxed) && x.dtype() == DType::F32 && on_flex(&x.device())
}

/// Reports whether the fused form reads this weight: values of 16 or 32 bits, or codes.
pub(super) fn fits_weight<const D: usize>(x: &Tensor<D>) -> bool {
    let dtype = matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
    super::fused::FUSED.load(Ordering::Relaxed) && dtype && on_flex(&x.device())
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

/// Values of a tensor of whole numbers that was cast to i32 and that [`contiguous`] gave.
pub(super) fn whole_numbers(x: &FlexTensor) -> &[i32] {
    match x.as_slice::<i32>() {
        Some(values) => values,
        None => unreachable!("the tensor was cast to i32 and made contiguous"),
    }
}

/// A tensor of values in row-major order.
pub(super) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape.into()), DType::F32)
}

/// Values that are zero before they are written, and cleared by the task that writes them: in the cache, and on all threads.
pub(super) struct Cleared {
    values: Vec<f32>,
    count: usize,
    cleared: AtomicUsize,
}

impl Cleared {
    pub fn new(count: usize) -> Self {
        Self { values: Vec::with_capacity(count), count, cleared: AtomicUsize::new(0) }
    }

    /// The elements in parts of `size`, the last one possibly smaller; all parts must be visited.
    pub fn parts(&mut self, size: usize) -> impl IndexedParallelIterator<Item = &mut [f32]> {
        let Self { values, count, cleared } = self;
        *cleared.get_mut() = 0;
        values.spare_capacity_mut()[..*count].par_chunks_mut(size.max(1)).map(|part| {
            part.fill(MaybeUninit::new(0.0));
            cleared.fetch_add(part.len(), Ordering::Relaxed);
            // SAFETY: all of it was just initialised.
            unsafe { part.assume_init_mut() }
        })
    }

    /// The contents of the parts.
    pub fn into_values(mut self) -> Vec<f32> {
        assert_eq!(self.cleared.into_inner(), self.count, "all parts were gone through");
        // SAFETY: there is capacity for `count` values, which have been initialised.
        unsafe { self.values.set_len(self.count) };
        self.values
    }
}

/// Zeros, cleared by all threads.
pub(super) fn zeros(count: usize) -> Vec<f32> {
    let mut zeros = Cleared::new(count);
    zeros.parts(1 << 16).for_each(|_| ());
    zeros.into_values()
}

/// `exp` to within 2e-7 of itself, without branches; denormal results are 0, and above 88.3 the result stays at its largest.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleared_values_are_those_that_tasks_wrote() {
        for (count, size) in [(0, 3), (1, 1), (10, 3), (12, 4), (100_000, 1000)] {
            let mut values = Cleared::new(count);
            values.parts(size).enumerate().for_each(|(number, part)| part[0] += number as f32 + 1.0);
            for (place, value) in values.into_values().into_iter().enumerate() {
                let expected = if place % size == 0 { (place / size + 1) as f32 } else { 0.0 };
                assert_eq!(value, expected);
            }
            assert_eq!(zeros(count), vec![0.0; count]);
        }
    }

    #[test]
    #[should_panic(expected = "all parts")]
    fn values_that_nobody_cleared_are_not_given_out() {
        let mut values = Cleared::new(10);
        values.parts(3).take(2).for_each(|_| ());
        values.into_values();
    }

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
}
