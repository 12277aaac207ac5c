//! Matrices as small integers with a scale and a zero for each group of values, as Q-GaLore stores projectors and weights: "Q-GaLore: Quantized
//! GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients" (Zhang et al., arXiv 2407.08296).

use burn::optim::{StateSink, StateSource};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowrank_kernels::host::values;
use lowrank_kernels::narrow::groups::{QuantisedGroups, Rounding, quantise_groups};

use crate::state::moments::byte_tensor;

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
        let QuantisedGroups { codes, scales, zeros } = quantise_groups(&values(matrix), bits, group, Rounding::Nearest);
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
