//! Storage of trained weights in fewer bytes than f32, for any optimizer.
//!
//! A step reads the stored weight as f32, lets the optimizer change it, and rounds the result once. Forward passes read the stored weight
//! itself. Random bits are a function of seed, parameter, step and element ([`Draws`]): threads, resume and order do not matter.

use std::fmt;

use burn::optim::{Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, bf16};
use lowrank_kernels::narrow::bf16::{STEPS_8, STEPS_16, compensated, corrected, joined, nearest, stochastic, widened};
use lowrank_kernels::narrow::draws::{Draws, Stream};
use lowrank_kernels::narrow::groups::{Rounding, encode};
use lowrank_kernels::narrow::packed::{Codes, PackedMatrix, packed};
use lowrank_kernels::vectorised::vectorised;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::change::WeightChange;
use crate::precision::in_f32;
use crate::state::moments::byte_tensor;
use crate::state::reset::ResetMoments;

/// Storage of trained matrices between steps; vectors stay in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WeightStorage {
    /// 4 bytes a weight.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// 2 bytes: bf16, rounded at random, so that small changes count on average.
    #[serde(rename = "bf16")]
    Bf16,
    /// 2 bytes: bf16, rounded to the nearest; changes below 2^-9 of a weight are lost.
    #[serde(rename = "bf16-nearest")]
    Bf16Nearest,
    /// 4 bytes: bf16, and what rounding cut off in a second bf16.
    #[serde(rename = "bf16-kahan")]
    Bf16Kahan,
    /// 3 bytes: bf16, and what rounding cut off in 8 bits.
    #[serde(rename = "24bit")]
    Bf16Plus8,
    /// 4 bytes: bf16, and what rounding cut off in 16 bits.
    #[serde(rename = "bf16-plus-16")]
    Bf16Plus16,
    /// 1 byte: integers in groups of 256, rounded at random. Embedding and head are in bf16.
    #[serde(rename = "int8")]
    Int8,
}

impl WeightStorage {
    /// All storages.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::Bf16, Self::Bf16Nearest, Self::Bf16Kahan, Self::Bf16Plus8, Self::Bf16Plus16, Self::Int8];

    /// Name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Bf16Nearest => "bf16-nearest",
            Self::Bf16Kahan => "bf16-kahan",
            Self::Bf16Plus8 => "24bit",
            Self::Bf16Plus16 => "bf16-plus-16",
            Self::Int8 => "int8",
        }
    }

    /// Storage of the matrices that 8-bit integers do not hold: embedding and head.
    pub fn of_tables(self) -> Self {
        if self == Self::Int8 { Self::Bf16 } else { self }
    }

    /// Bytes of the corrections of a matrix of this number of elements, which are kept with the optimizer's state.
    pub fn correction_bytes(self, count: usize) -> usize {
        count * self.correction_width()
    }

    fn correction_width(self) -> usize {
        match self {
            Self::Bf16Kahan | Self::Bf16Plus16 => 2,
            Self::Bf16Plus8 => 1,
            _ => 0,
        }
    }
}

impl fmt::Display for WeightStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Weights in bf16 and, where the storage has them, the bytes of their corrections.
pub fn stored(values: &[f32], storage: WeightStorage) -> (Vec<bf16>, Vec<u8>) {
    let width = storage.correction_width();
    let mut corrections = vec![0; values.len() * width];
    let weights = values.iter().enumerate().map(|(index, x)| {
        let (weight, code) = match storage {
            WeightStorage::Bf16Plus8 => corrected(*x, STEPS_8),
            WeightStorage::Bf16Plus16 => corrected(*x, STEPS_16),
            WeightStorage::Bf16Kahan => {
                let weight = nearest(*x);
                (weight, nearest(x - widened(weight)) as i16)
            }
            _ => (nearest(*x), 0),
        };
        corrections[index * width..][..width].copy_from_slice(&code.to_le_bytes()[..width]);
        bf16::from_bits(weight)
    });
    (weights.collect(), corrections)
}

/// An optimizer of weights that are stored in bf16 or 8-bit integers. Parameters in f32 are handed to the optimizer as they are.
#[derive(Clone, Debug)]
pub struct Narrow<O> {
    optimizer: O,
    storage: WeightStorage,
    seed: u64,
    key: u64,
}

impl<O> Narrow<O> {
    /// The optimizer of a parameter, with the key of its path ([`key_of`](crate::key_of)).
    pub fn new(optimizer: O, storage: WeightStorage, seed: u64, key: u64) -> Self {
        Self { optimizer, storage, seed, key }
    }

    fn draws(&self, stream: Stream, step: usize) -> Draws {
        Draws::new(self.seed, stream, step as u32, self.key)
    }
}

/// State of [`Narrow`] for one parameter.
#[derive(Clone, Debug)]
pub struct NarrowState<S> {
    /// State of the optimizer.
    pub inner: Option<S>,
    /// Steps taken.
    pub steps: usize,
    /// Corrections of the weights, in bytes.
    pub corrections: Option<Tensor<1, Int>>,
}

impl<S> NarrowState<S> {
    /// The state before the first step of weights that were stored with these corrections.
    pub fn of(corrections: Vec<u8>, device: &Device) -> Self {
        let corrections = (!corrections.is_empty()).then(|| byte_tensor(corrections, device));
        Self { inner: None, steps: 0, corrections }
    }
}

impl<O: WeightChange> Optimizer for Narrow<O> {
    type State<const D: usize> = NarrowState<O::State<D>>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let device = tensor.device();
        let state = state.unwrap_or_else(|| NarrowState::of(Vec::new(), &device));
        let steps = state.steps + 1;
        if let Some(matrix) = codes_of(&tensor) {
            let before = Tensor::<D>::from_data(TensorData::new(matrix.restored(), tensor.shape()), &device);
            let (after, inner) = self.optimizer.step(lr, before, grad, state.inner);
            let after = lowrank_kernels::host::values(after);
            let matrix = requantised(matrix, &after, self.draws(Stream::TwentyFour, steps));
            return (holding(&matrix, &device), Some(NarrowState { inner, steps, corrections: None }));
        }
        if tensor.dtype() != DType::BF16 {
            let (tensor, inner) = self.optimizer.step(lr, tensor, grad, state.inner);
            return (tensor, Some(NarrowState { inner, steps, corrections: None }));
        }
        let (shape, count) = (tensor.shape(), tensor.shape().num_elements());
        let mut weights = match tensor.into_data().try_into_vec::<bf16>() {
            Ok(weights) => weights,
            Err(error) => unreachable!("a tensor of bf16 has such data: {error:?}"),
        };
        let mut corrections = match state.corrections.map(|bytes| bytes.into_data().try_into_vec::<u8>()) {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) => unreachable!("corrections are bytes: {error:?}"),
            None => vec![0; self.storage.correction_bytes(count)],
        };
        let rounding = Rounded { storage: self.storage, draws: self.draws(Stream::Sixteen, steps) };
        let mut values = vec![0.0; count];
        rounding.restore(&weights, &corrections, &mut values);
        let before = Tensor::<D>::from_data(TensorData::new(values, shape.clone()), &device);
        let (result, inner) = in_f32(before, grad, |before, grad| match self.storage {
            // The compensation is finer than the places of the weight.
            WeightStorage::Bf16Kahan => self.optimizer.change(lr, before, grad, state.inner),
            _ => self.optimizer.step(lr, before, grad, state.inner),
        });
        rounding.store(&lowrank_kernels::host::values(result), &mut weights, &mut corrections);
        let tensor = Tensor::from_data(TensorData::new(weights, shape), (&device, DType::BF16));
        let corrections = (!corrections.is_empty()).then(|| byte_tensor(corrections, &device));
        (tensor, Some(NarrowState { inner, steps, corrections }))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        NarrowState {
            inner: state.inner.map(|inner| O::to_device(inner, device)),
            steps: state.steps,
            corrections: state.corrections.map(|corrections| corrections.to_device(device)),
        }
    }
}

impl<O: ResetMoments + WeightChange> ResetMoments for Narrow<O> {
    fn reset<const D: usize>(&self, state: Self::State<D>, change: &mut dyn FnMut(&mut [f32])) -> Self::State<D> {
        let inner = state.inner.map(|inner| self.optimizer.reset(inner, change));
        NarrowState { inner, ..state }
    }
}

impl<S: RecordState> RecordState for NarrowState<S> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        if let Some(inner) = &self.inner {
            inner.state_flatten(&crate::join_path(prefix, "inner"), out);
        }
        out.push_scalar(prefix, "steps", self.steps.into());
        if let Some(corrections) = &self.corrections {
            out.push_tensor(prefix, "corrections", corrections.to_data());
        }
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, device: &Device) -> Option<Self> {
        let steps = source.take_scalar(prefix, "steps")?.try_into().ok()?;
        let corrections = source.take_tensor(prefix, "corrections");
        let corrections = corrections.map(|data| byte_tensor(data.as_bytes().to_vec(), device));
        Some(Self { inner: S::state_unflatten(&crate::join_path(prefix, "inner"), source, device), steps, corrections })
    }
}

/// Rounding of bf16 weights in one step.
#[derive(Clone, Copy)]
struct Rounded {
    storage: WeightStorage,
    draws: Draws,
}

/// Elements that a task rounds.
const PART: usize = 1 << 13;
/// Elements whose draws are made at a time.
const DRAWN: usize = 256;

impl Rounded {
    #[inline(always)]
    fn restored(self, weight: u16, correction: &[u8]) -> f32 {
        match self.storage {
            WeightStorage::Bf16Plus8 => joined(weight, i16::from(correction[0] as i8), STEPS_8),
            WeightStorage::Bf16Plus16 => joined(weight, i16::from_le_bytes([correction[0], correction[1]]), STEPS_16),
            _ => widened(weight),
        }
    }

    /// The weights in f32.
    fn restore(self, weights: &[bf16], corrections: &[u8], values: &mut [f32]) {
        let width = self.storage.correction_width();
        values.par_chunks_mut(PART).enumerate().for_each(|(part, values)| {
            vectorised(
                #[inline(always)]
                || {
                    for (index, value) in values.iter_mut().enumerate() {
                        let index = part * PART + index;
                        *value = self.restored(weights[index].to_bits(), &corrections[index * width..][..width]);
                    }
                },
            );
        });
    }

    /// Rounds weights to their new values, or, with compensation, by their changes. One that did not change keeps its bits.
    fn store(self, values: &[f32], weights: &mut [bf16], corrections: &mut [u8]) {
        let width = self.storage.correction_width();
        // Without corrections all parts are empty.
        let parts: Vec<&mut [u8]> = match width {
            0 => weights.chunks(PART).map(|_| &mut [][..]).collect(),
            width => corrections.chunks_mut(width * PART).collect(),
        };
        let parts = weights.par_chunks_mut(PART).zip(values.par_chunks(PART)).zip(parts);
        parts.enumerate().for_each(|(part, ((weights, values), corrections))| {
            let mut drawn = [0u16; DRAWN];
            let mut first = 0;
            for (weights, values) in weights.chunks_mut(DRAWN).zip(values.chunks(DRAWN)) {
                vectorised(
                    #[inline(always)]
                    || {
                        if self.storage == WeightStorage::Bf16 {
                            self.draws.sixteen(part * PART + first, &mut drawn[..values.len()]);
                        }
                        for (index, (weight, value)) in weights.iter_mut().zip(values).enumerate() {
                            let correction = &mut corrections[(first + index) * width..][..width];
                            self.store_one(*value, drawn[index], weight, correction);
                        }
                    },
                );
                first += values.len();
            }
        });
    }

    #[inline(always)]
    fn store_one(self, value: f32, draw: u16, weight: &mut bf16, correction: &mut [u8]) {
        let kept =
            if self.storage == WeightStorage::Bf16Kahan { 0.0 } else { self.restored(weight.to_bits(), correction) };
        if kept == value {
            return;
        }
        let (bits, code) = match self.storage {
            WeightStorage::Bf16 => (stochastic(value, draw), 0),
            WeightStorage::Bf16Plus8 => corrected(value, STEPS_8),
            WeightStorage::Bf16Plus16 => corrected(value, STEPS_16),
            WeightStorage::Bf16Kahan => {
                let compensation = u16::from_le_bytes([correction[0], correction[1]]);
                let (bits, compensation) = compensated(weight.to_bits(), compensation, value);
                (bits, compensation as i16)
            }
            _ => (nearest(value), 0),
        };
        *weight = bf16::from_bits(bits);
        correction.copy_from_slice(&code.to_le_bytes()[..correction.len()]);
    }
}

/// The matrix with new values; groups without a change keep their codes.
pub fn requantised(matrix: PackedMatrix, values: &[f32], draws: Draws) -> PackedMatrix {
    let PackedMatrix { shape, transposed, codes } = matrix;
    let Codes::Groups(mut groups, size) = codes else {
        unreachable!("4-bit codes are frozen");
    };
    let parts = groups.codes.par_chunks_mut(size).zip(values.par_chunks(size));
    let grids = groups.scales.par_iter_mut().zip(groups.zeros.par_iter_mut());
    parts.zip(grids).enumerate().for_each(|(number, ((codes, values), (scale, zero)))| {
        let same = |(code, value): (&u8, &f32)| ((f32::from(*code) - *zero) * *scale).to_bits() == value.to_bits();
        if !codes.iter().zip(values).all(same) {
            (*scale, *zero) = encode(values, 8, number * size, Rounding::Random(draws), codes);
        }
    });
    PackedMatrix { shape, transposed, codes: Codes::Groups(groups, size) }
}

/// The codes that a parameter holds.
fn codes_of<const D: usize>(tensor: &Tensor<D>) -> Option<PackedMatrix> {
    if D != 2 || tensor.dtype() != DType::F32 {
        return None;
    }
    packed(&Tensor::from_dispatch(tensor.clone().into_dispatch()))
}

fn holding<const D: usize>(matrix: &PackedMatrix, device: &Device) -> Tensor<D> {
    Tensor::from_dispatch(lowrank_kernels::narrow::packed::carrier(matrix, device).into_dispatch())
}

#[cfg(test)]
mod tests;
