//! Matrices as small integers with a scale and a zero for each group of values, as Q-GaLore stores projectors and weights: "Q-GaLore: Quantized
//! GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients" (Zhang et al., arXiv 2407.08296).

use burn::optim::{StateSink, StateSource};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowrank_kernels::host::values;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::state::moments::byte_tensor;

/// Integers of groups of consecutive values, with the parameters to decode them.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedGroups {
    /// From 0 to `2^bits - 1`, one per element.
    pub codes: Vec<u8>,
    /// Value of a step, one per group.
    pub scales: Vec<f32>,
    /// Code of the value 0, one per group.
    pub zeros: Vec<f32>,
}

/// Smallest range of a group; a constant one would divide by zero.
const MIN_RANGE: f32 = 1e-5;

/// `clamp(round(x / scale) + zero)` with `scale = max(hi - lo, 1e-5) / (2^bits - 1)` and `zero = clamp(-round(lo / scale))`, rounded half to even;
/// with a generator up or down at random, so that the mean is exact.
///
/// The range of a group always includes 0, in contrast to the published code, whose codes saturate where all values have one sign.
pub fn quantise_groups(values: &[f32], bits: u32, group: usize, mut rng: Option<&mut StdRng>) -> QuantisedGroups {
    let top = ((1u32 << bits) - 1) as f32;
    let mut result = QuantisedGroups { codes: Vec::with_capacity(values.len()), scales: vec![], zeros: vec![] };
    for values in values.chunks(group) {
        let low = values.iter().copied().fold(0.0, f32::min);
        let high = values.iter().copied().fold(0.0, f32::max);
        // Codes cannot represent a value that is not finite: the scale of its group does.
        let is_finite = values.iter().all(|x| x.is_finite());
        let scale = if is_finite { (high - low).max(MIN_RANGE) / top } else { f32::NAN };
        let zero = if is_finite { (-(low / scale).round_ties_even()).clamp(0.0, top) } else { 0.0 };
        result.scales.push(scale);
        result.zeros.push(zero);
        result.codes.extend(values.iter().map(|x| {
            let exact = x / scale;
            let rounded = match &mut rng {
                // A value on the grid stays: its quotient may miss the whole number by rounding.
                Some(_) if (exact - exact.round()).abs() <= 2e-6 * exact.abs() => exact.round(),
                Some(rng) => exact.floor() + f32::from(u8::from(rng.random::<f32>() < exact - exact.floor())),
                None => exact.round_ties_even(),
            };
            (rounded + zero).clamp(0.0, top) as u8
        }));
    }
    result
}

impl QuantisedGroups {
    /// `(code - zero) * scale`.
    pub fn restored(&self, group: usize) -> Vec<f32> {
        let groups = self.codes.chunks(group).zip(self.scales.iter().zip(&self.zeros));
        groups
            .flat_map(|(codes, (scale, zero))| codes.iter().map(move |code| (f32::from(*code) - zero) * scale))
            .collect()
    }
}

/// A stored matrix; codes of up to 4 bits share a byte, the first in the high half.
#[derive(Clone, Debug)]
pub struct QuantisedMatrix {
    codes: Tensor<1, Int>,
    scales: Tensor<1>,
    zeros: Tensor<1>,
    shape: [usize; 2],
    bits: u32,
    group: usize,
}

impl QuantisedMatrix {
    /// Rounds a matrix.
    pub fn of(matrix: Tensor<2>, bits: u32, group: usize) -> Self {
        let (shape, device) = (matrix.dims(), matrix.device());
        let QuantisedGroups { codes, scales, zeros } = quantise_groups(&values(matrix), bits, group, None);
        let codes = match bits <= 4 {
            true => codes.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(0)).collect(),
            false => codes,
        };
        let floats = |values: Vec<f32>| {
            let count = values.len();
            Tensor::from_data(TensorData::new(values, [count]), &device)
        };
        Self { codes: byte_tensor(codes, &device), scales: floats(scales), zeros: floats(zeros), shape, bits, group }
    }

    /// The matrix that the codes represent.
    pub fn restored(&self) -> Tensor<2> {
        let count = self.shape[0] * self.shape[1];
        let data = self.codes.to_data();
        let codes = match self.bits <= 4 {
            true => data.as_bytes().iter().flat_map(|byte| [byte >> 4, byte & 15]).take(count).collect(),
            false => data.as_bytes().to_vec(),
        };
        let groups = QuantisedGroups { codes, scales: values(self.scales.clone()), zeros: values(self.zeros.clone()) };
        Tensor::from_data(TensorData::new(groups.restored(self.group), self.shape), &self.scales.device())
    }

    /// Bytes of a matrix of this number of elements.
    pub fn bytes(count: usize, bits: u32, group: usize) -> usize {
        let codes = if bits <= 4 { count.div_ceil(2) } else { count };
        codes + 8 * count.div_ceil(group)
    }

    pub(crate) fn to_device(&self, device: &Device) -> Self {
        Self {
            codes: self.codes.clone().to_device(device),
            scales: self.scales.clone().to_device(device),
            zeros: self.zeros.clone().to_device(device),
            ..*self
        }
    }

    pub(crate) fn flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_tensor(prefix, "codes", self.codes.to_data());
        out.push_tensor(prefix, "scales", self.scales.to_data());
        out.push_tensor(prefix, "zeros", self.zeros.to_data());
        let [rows, columns] = self.shape;
        for (name, value) in [("rows", rows), ("columns", columns), ("bits", self.bits as usize), ("group", self.group)]
        {
            out.push_scalar(prefix, name, value.into());
        }
    }

    pub(crate) fn unflatten(prefix: &str, source: &mut StateSource, device: &Device) -> Option<Self> {
        let codes = source.take_tensor(prefix, "codes")?.as_bytes().to_vec();
        let scales = Tensor::from_data(source.take_tensor(prefix, "scales")?, (device, DType::F32));
        let zeros = Tensor::from_data(source.take_tensor(prefix, "zeros")?, (device, DType::F32));
        let mut number = |name| -> Option<usize> { source.take_scalar(prefix, name)?.try_into().ok() };
        let shape = [number("rows")?, number("columns")?];
        let (bits, group) = (number("bits")? as u32, number("group")?);
        Some(Self { codes: byte_tensor(codes, device), scales, zeros, shape, bits, group })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_kernels::random::generator;

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        for bad in [f32::NAN, f32::INFINITY] {
            let restored = quantise_groups(&[1.0, bad, 2.0, 3.0], 8, 2, None).restored(2);
            assert!(restored[..2].iter().all(|x| x.is_nan()) && restored[2..].iter().all(|x| x.is_finite()), "{bad}");
        }
    }

    #[test]
    fn groups_of_one_sign_keep_their_values() {
        for bits in [4, 8] {
            for values in [vec![1.0; 8], vec![-3.0; 8], (1..9).map(|i| 5.0 + i as f32).collect(), vec![-0.5, -0.25]] {
                let groups = quantise_groups(&values, bits, 8, None);
                for (x, restored) in values.iter().zip(groups.restored(8)) {
                    assert!((x - restored).abs() <= 0.501 * groups.scales[0], "{bits} bits: {x} {restored}");
                }
            }
        }
    }

    #[test]
    fn values_are_within_half_a_step_and_constant_groups_finite() {
        let original: Vec<f32> = (0..64).map(|i| (i as f32 * 1.7).sin()).chain([0.25; 16]).chain([0.0; 16]).collect();
        for bits in [4, 8] {
            let groups = quantise_groups(&original, bits, 16, None);
            for (i, (restored, x)) in groups.restored(16).iter().zip(&original).enumerate() {
                assert!(restored.is_finite());
                let constant = i >= 64;
                // At the ends the rounding of the zero adds half a step.
                assert!(constant || (restored - x).abs() <= groups.scales[i / 16] * 1.01, "{bits} {i} {restored} {x}");
            }
        }
    }

    #[test]
    fn rounding_at_random_is_exact_on_average_and_leaves_values_on_the_grid() {
        let original = [-1.0f32, 0.3, 0.77, 1.0];
        let mut rng = generator(0, 0, 0);
        let mut sums = [0f64; 4];
        let mut squares = [0f64; 4];
        let draws = 10_000;
        for _ in 0..draws {
            let restored = quantise_groups(&original, 4, 4, Some(&mut rng)).restored(4);
            for i in 0..4 {
                sums[i] += f64::from(restored[i]);
                squares[i] += f64::from(restored[i]).powi(2);
            }
        }
        // The middle ones: the ends may be clamped.
        for i in 1..3 {
            let mean = sums[i] / f64::from(draws);
            let error = ((squares[i] / f64::from(draws) - mean * mean) / f64::from(draws)).sqrt();
            assert!((mean - f64::from(original[i])).abs() < 3.0 * error, "{mean} {}", original[i]);
        }
        let first = quantise_groups(&[0.0, 0.3, 0.77, 1.0], 8, 4, None);
        let again = quantise_groups(&first.restored(4), 8, 4, Some(&mut rng));
        assert_eq!(first.codes, again.codes);
    }
}
