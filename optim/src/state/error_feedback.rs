//! Residual of a projection, kept for the next step: whole, or quantised row by row.

use burn::optim::{RecordState, StateSink, StateSource};
use burn::tensor::{Device, Int, Tensor, TensorData};
use lowrank_kernels::host::values;
use lowrank_kernels::vectorised::vectorised;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::state::moments::byte_tensor;

/// Storage of the residual that the projection leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorFeedback {
    /// It is dropped.
    None,
    /// It is added to the next gradient, kept in f32.
    Full,
    /// It is added to the next gradient, kept in codes between the smallest and the largest value of each row.
    Quantised,
}

/// A stored residual of shape `[rows, columns]`.
#[derive(Clone, Debug, RecordState)]
pub struct ErrorBuffer {
    full: Option<Tensor<2>>,
    codes: Option<Codes>,
}

/// Codes with the range of each row.
#[derive(Clone, Debug)]
struct Codes {
    /// One or two codes per byte, the first in the high half; each row starts at a new byte.
    bytes: Tensor<1, Int>,
    low: Tensor<1>,
    high: Tensor<1>,
    columns: usize,
    levels: u8,
}

/// A quantised row as numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedRow {
    /// Codes, one a value.
    pub codes: Vec<u8>,
    /// Smallest value, that of code 0.
    pub low: f32,
    /// Largest value, that of the last code.
    pub high: f32,
}

/// `floor((x - low) / unit + 1/2)` with `unit = (high - low) / levels`; a constant row has codes 0.
pub fn quantise_row(row: &[f32], levels: u8) -> QuantisedRow {
    let mut codes = vec![0; row.len()];
    let (low, high) = encode(row, levels, &mut codes);
    QuantisedRow { codes, low, high }
}

/// Lanes of the reductions, which would run element by element otherwise.
const LANES: usize = 16;

/// Encodes a row, one code per byte; returns its smallest and largest value.
fn encode(row: &[f32], levels: u8, codes: &mut [u8]) -> (f32, f32) {
    vectorised(
        #[inline(always)]
        || {
            let (mut lows, mut highs) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
            let (chunks, rest) = row.as_chunks::<LANES>();
            for chunk in chunks {
                for lane in 0..LANES {
                    lows[lane] = if chunk[lane] < lows[lane] { chunk[lane] } else { lows[lane] };
                    highs[lane] = if chunk[lane] > highs[lane] { chunk[lane] } else { highs[lane] };
                }
            }
            let low = lows.into_iter().chain(rest.iter().copied()).fold(f32::INFINITY, f32::min);
            let high = highs.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max);
            let top = f32::from(levels);
            let unit = (high - low) / top;
            if unit > 0.0 && unit.is_finite() {
                // A whole number below 256 is in the lowest byte of its sum with 2^23.
                const WHOLE: f32 = 8_388_608.0;
                for (code, x) in codes.iter_mut().zip(row) {
                    let exact = ((x - low) / unit + 0.5).floor();
                    let held = if exact > top { top } else { exact };
                    *code = (held + WHOLE).to_bits() as u8;
                }
            } else {
                codes.fill(0);
            }
            (low, high)
        },
    )
}

/// Adds the values of codes, one a byte, to a row.
fn add_decoded(row: &mut [f32], codes: &[u8], (low, high): (f32, f32), levels: u8) {
    let unit = (high - low) / f32::from(levels);
    vectorised(
        #[inline(always)]
        || {
            for (x, code) in row.iter_mut().zip(codes) {
                let inner = f32::from(*code) * unit + low;
                // The ends are exact.
                let value = if *code == levels { high } else { inner };
                *x += if *code == 0 { low } else { value };
            }
        },
    );
}

impl ErrorBuffer {
    /// Stores a residual; none if no residual is kept. `levels` is the number of steps between the smallest and the largest value of a row,
    /// 1 to 255; up to 15 levels two codes share a byte.
    pub fn keep(rest: Tensor<2>, how: ErrorFeedback, levels: u8) -> Option<Self> {
        match how {
            ErrorFeedback::None => None,
            ErrorFeedback::Full => Some(Self { full: Some(rest), codes: None }),
            ErrorFeedback::Quantised => Some(Self { full: None, codes: Some(Codes::of(rest, levels)) }),
        }
    }

    /// Adds the residual to a matrix on the host.
    pub(crate) fn add_to(self, matrix: &mut [f32]) {
        if let Some(codes) = self.codes {
            codes.add_to(matrix);
        } else if let Some(full) = self.full {
            let full = values(full);
            matrix.par_iter_mut().zip(&full).with_min_len(1 << 14).for_each(|(x, rest)| *x += rest);
        }
    }

    /// The residual as it is added to the next gradient, `[rows, columns]`.
    pub fn restored(&self) -> Option<Tensor<2>> {
        self.full.clone().or_else(|| self.codes.clone().map(Codes::restored))
    }

    /// Codes row by row, where there are any.
    pub fn quantised(&self) -> Option<Vec<QuantisedRow>> {
        self.codes.as_ref().map(Codes::rows)
    }

    pub(crate) fn to_device(&self, device: &Device) -> Self {
        let codes = self.codes.as_ref().map(|codes| Codes {
            bytes: codes.bytes.clone().to_device(device),
            low: codes.low.clone().to_device(device),
            high: codes.high.clone().to_device(device),
            ..*codes
        });
        Self { full: self.full.as_ref().map(|full| full.clone().to_device(device)), codes }
    }
}

/// Number of levels up to which a code takes half a byte.
const HALF_BYTE: u8 = 15;

/// Bytes that a row of codes takes.
fn row_bytes(columns: usize, levels: u8) -> usize {
    if levels <= HALF_BYTE { columns.div_ceil(2) } else { columns }
}

impl Codes {
    fn of(rest: Tensor<2>, levels: u8) -> Self {
        let ([rows, columns], device) = (rest.dims(), rest.device());
        let rest = values(rest);
        let stride = row_bytes(columns, levels);
        let mut bytes = vec![0; rows * stride];
        let (mut low, mut high) = (vec![0.0; rows], vec![0.0; rows]);
        let coded = bytes.par_chunks_mut(stride).zip(low.par_iter_mut().zip(&mut high));
        coded.zip(rest.par_chunks(columns)).with_min_len(8).for_each_init(
            || vec![0; columns],
            |codes, ((bytes, (low, high)), row)| {
                if levels <= HALF_BYTE {
                    (*low, *high) = encode(row, levels, codes);
                    bytes.iter_mut().zip(codes.chunks(2)).for_each(|(byte, pair)| *byte = pack(pair));
                } else {
                    (*low, *high) = encode(row, levels, bytes);
                }
            },
        );
        let ranges = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, [rows]), &device);
        Self { bytes: byte_tensor(bytes, &device), low: ranges(low), high: ranges(high), columns, levels }
    }

    fn rows(&self) -> Vec<QuantisedRow> {
        let bytes = self.bytes.to_data();
        let (low, high) = (values(self.low.clone()), values(self.high.clone()));
        let rows = bytes
            .as_bytes()
            .chunks(row_bytes(self.columns, self.levels))
            .map(|row| unpack(row, self.columns, self.levels));
        rows.zip(low.into_iter().zip(high)).map(|(codes, (low, high))| QuantisedRow { codes, low, high }).collect()
    }

    fn add_to(self, matrix: &mut [f32]) {
        let Self { bytes, low, high, columns, levels } = self;
        let (bytes, low, high) = (bytes.into_data(), values(low), values(high));
        let coded = bytes.as_bytes().par_chunks(row_bytes(columns, levels)).zip(low.par_iter().zip(&high));
        matrix.par_chunks_mut(columns).zip(coded).with_min_len(8).for_each(|(row, (bytes, (low, high)))| {
            match levels <= HALF_BYTE {
                true => add_decoded(row, &unpack(bytes, columns, levels), (*low, *high), levels),
                false => add_decoded(row, bytes, (*low, *high), levels),
            }
        });
    }

    fn restored(self) -> Tensor<2> {
        let device = self.low.device();
        let shape = [self.low.dims()[0], self.columns];
        let mut values = vec![0.0; shape[0] * shape[1]];
        self.add_to(&mut values);
        Tensor::from_data(TensorData::new(values, shape), &device)
    }
}

fn unpack(row: &[u8], columns: usize, levels: u8) -> Vec<u8> {
    match levels <= HALF_BYTE {
        true => row.iter().flat_map(|byte| [byte >> 4, byte & 15]).take(columns).collect(),
        false => row.to_vec(),
    }
}

fn pack(codes: &[u8]) -> u8 {
    codes[0] << 4 | codes.get(1).copied().unwrap_or(0)
}

// Written by hand: the derive would read the bytes back as integers of four bytes.
impl RecordState for Codes {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_tensor(prefix, "bytes", self.bytes.to_data());
        out.push_tensor(prefix, "low", self.low.to_data());
        out.push_tensor(prefix, "high", self.high.to_data());
        out.push_scalar(prefix, "columns", self.columns.into());
        out.push_scalar(prefix, "levels", self.levels.into());
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, device: &Device) -> Option<Self> {
        let bytes = source.take_tensor(prefix, "bytes")?.as_bytes().to_vec();
        Some(Self {
            bytes: byte_tensor(bytes, device),
            low: Tensor::from_data(source.take_tensor(prefix, "low")?, device),
            high: Tensor::from_data(source.take_tensor(prefix, "high")?, device),
            columns: source.take_scalar(prefix, "columns")?.try_into().ok()?,
            levels: source.take_scalar(prefix, "levels")?.try_into().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::DType;

    fn rest(rows: usize, columns: usize) -> Tensor<2> {
        let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 1.3).sin() * (1.0 + i as f32)).collect();
        Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::default())
    }

    #[test]
    fn values_are_within_half_a_unit_and_the_ends_exact() {
        for (levels, columns) in [(255, 12), (15, 12), (15, 7), (1, 5)] {
            let original = rest(6, columns);
            let kept = ErrorBuffer::keep(original.clone(), ErrorFeedback::Quantised, levels).unwrap();
            let (restored, original) = (values(kept.restored().unwrap()), values(original));
            for (ours, row) in restored.chunks(columns).zip(original.chunks(columns)) {
                let QuantisedRow { low, high, .. } = quantise_row(row, levels);
                let unit = (high - low) / f32::from(levels);
                for (ours, exact) in ours.iter().zip(row) {
                    assert!((ours - exact).abs() <= unit / 2.0 * 1.00001 + 1e-6, "{ours} {exact}");
                    assert!(*exact != low && *exact != high || ours == exact);
                }
            }
        }
    }

    #[test]
    fn constant_rows_are_exact() {
        let constant = Tensor::<2>::from_data([[0.0, 0.0, 0.0], [-2.5, -2.5, -2.5]], &Device::default());
        let kept = ErrorBuffer::keep(constant.clone(), ErrorFeedback::Quantised, 255).unwrap();
        assert_eq!(values(kept.restored().unwrap()), values(constant));
    }

    #[test]
    fn codes_take_a_byte_or_half_of_one_also_after_a_record() {
        for (levels, bytes) in [(255, 4 * 9), (15, 4 * 5)] {
            let kept = ErrorBuffer::keep(rest(4, 9), ErrorFeedback::Quantised, levels).unwrap();
            let mut sink = StateSink::default();
            kept.state_flatten("p", &mut sink);
            let size: usize = sink.tensors.iter().map(|(_, data)| data.as_bytes().len()).sum();
            assert_eq!(size, bytes + 2 * 4 * 4);
            let mut source = StateSource::new(sink.scalars.into_iter().collect());
            sink.tensors.into_iter().for_each(|(name, data)| source.insert_tensor(name, data));
            let read = ErrorBuffer::state_unflatten("p", &mut source, &Device::default()).unwrap();
            assert_eq!(read.quantised(), kept.quantised());
            assert_eq!(read.codes.unwrap().bytes.dtype(), DType::U8);
        }
    }
}
