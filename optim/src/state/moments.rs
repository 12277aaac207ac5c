//! Storage of moments between steps: f32, bf16, or 8-bit blocks.

use burn::optim::{RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData, f16};
use lowrank_kernels::host::values;
use lowrank_kernels::narrow::blocks::{DynamicMap, dequantise, quantise};
use lowrank_kernels::narrow::companded::{self, Companding, decoded, encoded};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Type of stored moments; arithmetic is f32 in each case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MomentType {
    /// 4 bytes a value.
    F32,
    /// 2 bytes a value.
    Bf16,
    /// Codes of one byte and 4 bytes for each block of 256 values; tensors of less than 4096 values stay in f32.
    #[serde(rename = "8bit")]
    EightBit,
    /// Companded codes of one byte and 2 bytes for each group of 32 values; tensors of less than 4096 values stay in f32.
    #[serde(rename = "8bit-companded")]
    Companded,
}

/// Values in a block of 8-bit moments.
pub const BLOCK: usize = 256;

/// Tensors with fewer values keep f32 moments.
pub const MIN_8BIT_SIZE: usize = 4096;

/// Storage with its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage {
    /// Type of the values.
    pub kind: MomentType,
    /// Values in a block.
    pub block: usize,
    /// Smallest tensor that is stored as blocks.
    pub min_size: usize,
    /// Keeps positive second moments above 0.
    pub keep_positive: bool,
}

impl From<MomentType> for Storage {
    fn from(kind: MomentType) -> Self {
        let block = if kind == MomentType::Companded { companded::GROUP } else { BLOCK };
        Self { kind, block, min_size: MIN_8BIT_SIZE, keep_positive: false }
    }
}

impl Storage {
    /// Reports whether a tensor of `count` elements is stored as blocks.
    pub fn as_blocks(&self, count: usize) -> bool {
        matches!(self.kind, MomentType::EightBit | MomentType::Companded) && count >= self.min_size
    }

    /// Bytes of one moment of `count` elements.
    pub fn bytes(&self, count: usize) -> usize {
        match self.kind {
            MomentType::Bf16 => 2 * count,
            MomentType::EightBit if self.as_blocks(count) => count + 4 * count.div_ceil(self.block),
            MomentType::Companded if self.as_blocks(count) => count + 2 * count.div_ceil(self.block),
            _ => 4 * count,
        }
    }

    /// Keeps the values of a moment; `signed` for a first one.
    pub fn keep<const D: usize>(&self, values: Tensor<D>, signed: bool) -> Moment<D> {
        match self.kind {
            MomentType::Bf16 => Moment { whole: Some(values.cast(DType::BF16)), blocks: None },
            _ if self.as_blocks(values.shape().num_elements()) => {
                Moment { whole: None, blocks: Some(QuantisedMoment::of(values, signed, *self)) }
            }
            _ => Moment { whole: Some(values), blocks: None },
        }
    }
}

/// A stored moment.
#[derive(Clone, Debug)]
pub struct Moment<const D: usize> {
    whole: Option<Tensor<D>>,
    blocks: Option<QuantisedMoment>,
}

/// A moment as codes.
#[derive(Clone, Debug)]
pub struct QuantisedMoment {
    /// Codes, one per element, in row-major order.
    pub codes: Tensor<1, Int>,
    /// Largest magnitude of each block, or of its roots; of companded moments in f16.
    pub largest: Tensor<1>,
    /// Values in a block.
    pub block: usize,
    /// Uses the map with both signs.
    pub signed: bool,
    /// Companded instead of mapped.
    pub companded: bool,
    shape: Vec<usize>,
}

impl QuantisedMoment {
    fn of<const D: usize>(moment: Tensor<D>, signed: bool, storage: Storage) -> Self {
        let (shape, device) = (moment.dims().to_vec(), moment.device());
        let moment = values(moment);
        let companded = storage.kind == MomentType::Companded;
        let (codes, largest) = match companded {
            false => quantise(map(signed), &moment, storage.block, storage.keep_positive && !signed),
            true => {
                let (codes, scales) = encoded(companding(signed), &moment);
                (codes, scales.into_iter().map(f16::to_f32).collect())
            }
        };
        Self::from_parts(codes, largest, shape, signed, storage, &device)
    }

    pub(crate) fn from_parts(
        codes: Vec<u8>,
        largest: Vec<f32>,
        shape: Vec<usize>,
        signed: bool,
        storage: Storage,
        device: &Device,
    ) -> Self {
        let companded = storage.kind == MomentType::Companded;
        let (count, dtype) = (largest.len(), if companded { DType::F16 } else { DType::F32 });
        let largest = Tensor::from_data(TensorData::new(largest, [count]), (device, dtype));
        Self { codes: byte_tensor(codes, device), largest, block: storage.block, signed, companded, shape }
    }

    fn restored<const D: usize>(self) -> Tensor<D> {
        let device = self.largest.device();
        let (codes, largest) = (self.codes.into_data(), values(self.largest));
        let values = match self.companded {
            false => dequantise(map(self.signed), codes.as_bytes(), &largest, self.block),
            true => {
                let scales: Vec<f16> = largest.into_iter().map(f16::from_f32).collect();
                decoded(companding(self.signed), codes.as_bytes(), &scales)
            }
        };
        Tensor::from_data(TensorData::new(values, self.shape), &device)
    }
}

pub(crate) fn map(signed: bool) -> &'static DynamicMap {
    if signed { DynamicMap::signed() } else { DynamicMap::unsigned() }
}

pub(crate) fn companding(signed: bool) -> Companding {
    if signed { Companding::Signed } else { Companding::Root }
}

/// Bytes as a tensor of bytes, which no backend widens.
pub(crate) fn byte_tensor(bytes: Vec<u8>, device: &Device) -> Tensor<1, Int> {
    let shape = Shape::from([bytes.len()]);
    Tensor::from_data(TensorData::from_bytes_vec(bytes, shape, DType::U8), (device, DType::U8))
}

impl<const D: usize> Moment<D> {
    /// Returns the elements in f32.
    pub fn restored(self) -> Tensor<D> {
        match (self.whole, self.blocks) {
            (Some(whole), _) => whole.cast(DType::F32),
            (None, Some(blocks)) => blocks.restored(),
            (None, None) => unreachable!("a moment has values"),
        }
    }

    /// The codes, if the moment is stored as codes.
    pub fn blocks(&self) -> Option<&QuantisedMoment> {
        self.blocks.as_ref()
    }

    pub(crate) fn from_blocks(blocks: QuantisedMoment) -> Self {
        Self { whole: None, blocks: Some(blocks) }
    }

    pub(crate) fn into_blocks(self) -> Option<QuantisedMoment> {
        self.blocks
    }

    /// The same on another device.
    pub fn to_device(self, device: &Device) -> Self {
        Self {
            whole: self.whole.map(|whole| whole.to_device(device)),
            blocks: self.blocks.map(|blocks| QuantisedMoment {
                codes: blocks.codes.to_device(device),
                largest: blocks.largest.to_device(device),
                ..blocks
            }),
        }
    }
}

// Written by hand: the derive would read bf16 values and bytes back in the device's default types.
impl<const D: usize> RecordState for Moment<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        if let Some(whole) = &self.whole {
            out.push_tensor(prefix, "values", whole.to_data());
        }
        if let Some(blocks) = &self.blocks {
            out.push_tensor(prefix, "codes", blocks.codes.to_data());
            out.push_tensor(prefix, "largest", blocks.largest.to_data());
            out.push_scalar(prefix, "block", blocks.block.into());
            out.push_scalar(prefix, "signed", blocks.signed.into());
            out.push_scalar(prefix, "companded", blocks.companded.into());
            for (axis, length) in blocks.shape.iter().enumerate() {
                out.push_scalar(prefix, &format!("shape.{axis}"), (*length).into());
            }
        }
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, device: &Device) -> Option<Self> {
        if let Some(whole) = source.take_tensor(prefix, "values") {
            let dtype = whole.dtype();
            return Some(Self { whole: Some(Tensor::from_data(whole, (device, dtype))), blocks: None });
        }
        let codes = source.take_tensor(prefix, "codes")?;
        let shape = (0..D).map(|axis| source.take_scalar(prefix, &format!("shape.{axis}"))?.try_into().ok());
        let blocks = QuantisedMoment {
            shape: shape.collect::<Option<Vec<usize>>>()?,
            codes: byte_tensor(codes.as_bytes().to_vec(), device),
            largest: {
                let largest = source.take_tensor(prefix, "largest")?;
                let dtype = largest.dtype();
                Tensor::from_data(largest, (device, dtype))
            },
            block: source.take_scalar(prefix, "block")?.try_into().ok()?,
            signed: source.take_scalar(prefix, "signed")?.try_into().ok()?,
            companded: source.take_scalar(prefix, "companded")?.try_into().ok()?,
        };
        Some(Self::from_blocks(blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_keep_type_size_and_values() {
        let moment = || {
            let values: Vec<f32> = (0..5000).map(|i| (i as f32).sin()).collect();
            Tensor::<2>::from_data(TensorData::new(values, [50, 100]), &Device::default())
        };
        for kind in [MomentType::F32, MomentType::Bf16, MomentType::EightBit, MomentType::Companded] {
            let storage = Storage::from(kind);
            let kept = storage.keep(moment(), true);
            let mut sink = StateSink::default();
            kept.state_flatten("m", &mut sink);
            let bytes: usize = sink.tensors.iter().map(|(_, data)| data.as_bytes().len()).sum();
            assert_eq!(bytes, storage.bytes(5000), "{kind:?}");
            let mut source = StateSource::new(sink.scalars.into_iter().collect());
            sink.tensors.into_iter().for_each(|(name, data)| source.insert_tensor(name, data));
            let read = Moment::<2>::state_unflatten("m", &mut source, &Device::default()).unwrap();
            let mut again = StateSink::default();
            read.state_flatten("m", &mut again);
            assert_eq!(again.tensors.iter().map(|(_, data)| data.as_bytes().len()).sum::<usize>(), bytes);
            assert_eq!(values(read.restored()), values(kept.restored()), "{kind:?}");
        }
    }
}
