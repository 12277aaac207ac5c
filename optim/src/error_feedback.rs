//! What a projection leaves out, kept for the next step: whole, or quantised row by row.

use burn::optim::{RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};

/// How the rest of a projection is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorFeedback {
    /// It is dropped.
    None,
    /// In f32.
    Full,
    /// As codes `0..=levels` between the smallest and the largest value of each row; up to 15 levels two codes share a byte.
    Quantised {
        /// Number of steps between the smallest and the largest value, 1 to 255.
        levels: u8,
    },
}

/// A kept rest of shape `[rows, columns]`.
#[derive(Clone, Debug, RecordState)]
pub struct ErrorBuffer {
    full: Option<Tensor<2>>,
    codes: Option<Codes>,
}

/// Codes with the range of each row.
#[derive(Clone, Debug)]
struct Codes {
    /// One or two codes a byte, the first in the high half; a row begins with a byte of its own.
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
    let low = row.iter().copied().fold(f32::INFINITY, f32::min);
    let high = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let unit = (high - low) / f32::from(levels);
    let code = |x: f32| match unit > 0.0 {
        true => ((x - low) / unit + 0.5).floor().clamp(0.0, f32::from(levels)) as u8,
        false => 0,
    };
    QuantisedRow { codes: row.iter().map(|x| code(*x)).collect(), low, high }
}

impl ErrorBuffer {
    /// Keeps a rest; none when nothing is to be kept.
    pub fn keep(rest: Tensor<2>, how: ErrorFeedback) -> Option<Self> {
        match how {
            ErrorFeedback::None => None,
            ErrorFeedback::Full => Some(Self { full: Some(rest), codes: None }),
            ErrorFeedback::Quantised { levels } => Some(Self { full: None, codes: Some(Codes::of(rest, levels)) }),
        }
    }

    /// The rest as it is added to the next gradient, `[rows, columns]`.
    pub fn restored(&self) -> Option<Tensor<2>> {
        self.full.clone().or_else(|| self.codes.as_ref().map(Codes::restored))
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

/// Up to so many levels a code takes half a byte.
const HALF_BYTE: u8 = 15;

impl Codes {
    fn of(rest: Tensor<2>, levels: u8) -> Self {
        let ([_, columns], device) = (rest.dims(), rest.device());
        let values = host(rest);
        let rows: Vec<QuantisedRow> = values.chunks(columns).map(|row| quantise_row(row, levels)).collect();
        let bytes: Vec<u8> = match levels <= HALF_BYTE {
            true => rows.iter().flat_map(|row| row.codes.chunks(2).map(pack)).collect(),
            false => rows.iter().flat_map(|row| row.codes.iter().copied()).collect(),
        };
        let ranges = |value: fn(&QuantisedRow) -> f32| {
            let values: Vec<f32> = rows.iter().map(value).collect();
            let count = values.len();
            Tensor::from_data(TensorData::new(values, [count]), &device)
        };
        Self {
            bytes: byte_tensor(bytes, &device),
            low: ranges(|row| row.low),
            high: ranges(|row| row.high),
            columns,
            levels,
        }
    }

    fn rows(&self) -> Vec<QuantisedRow> {
        let bytes = self.bytes.to_data();
        let bytes = bytes.as_bytes();
        let (low, high) = (host(self.low.clone()), host(self.high.clone()));
        let packed = self.levels <= HALF_BYTE;
        let stride = if packed { self.columns.div_ceil(2) } else { self.columns };
        let unpacked = bytes.chunks(stride).map(|row| match packed {
            true => row.iter().flat_map(|byte| [byte >> 4, byte & 15]).take(self.columns).collect(),
            false => row.to_vec(),
        });
        unpacked.zip(low.into_iter().zip(high)).map(|(codes, (low, high))| QuantisedRow { codes, low, high }).collect()
    }

    fn restored(&self) -> Tensor<2> {
        let rows = self.rows();
        let shape = [rows.len(), self.columns];
        let value = |row: &QuantisedRow, code: u8| match code {
            // The ends are exact.
            code if code == self.levels => row.high,
            0 => row.low,
            code => f32::from(code) * ((row.high - row.low) / f32::from(self.levels)) + row.low,
        };
        let values: Vec<f32> = rows.iter().flat_map(|row| row.codes.iter().map(|code| value(row, *code))).collect();
        Tensor::from_data(TensorData::new(values, shape), &self.low.device())
    }
}

fn pack(codes: &[u8]) -> u8 {
    codes[0] << 4 | codes.get(1).copied().unwrap_or(0)
}

fn host<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    match x.into_data().convert::<f32>().try_into_vec() {
        Ok(values) => values,
        Err(error) => unreachable!("data converted to f32 is f32: {error:?}"),
    }
}

fn byte_tensor(bytes: Vec<u8>, device: &Device) -> Tensor<1, Int> {
    let shape = Shape::from([bytes.len()]);
    Tensor::from_data(TensorData::from_bytes_vec(bytes, shape, DType::U8), (device, DType::U8))
}

// By hand: the derive would read the bytes back as integers of four bytes.
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

    fn rest(rows: usize, columns: usize) -> Tensor<2> {
        let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 1.3).sin() * (1.0 + i as f32)).collect();
        Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::default())
    }

    #[test]
    fn values_are_within_half_a_unit_and_the_ends_exact() {
        for (levels, columns) in [(255, 12), (15, 12), (15, 7), (1, 5)] {
            let original = rest(6, columns);
            let kept = ErrorBuffer::keep(original.clone(), ErrorFeedback::Quantised { levels }).unwrap();
            let (restored, original) = (host(kept.restored().unwrap()), host(original));
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
        let kept = ErrorBuffer::keep(constant.clone(), ErrorFeedback::Quantised { levels: 255 }).unwrap();
        assert_eq!(host(kept.restored().unwrap()), host(constant));
    }

    #[test]
    fn codes_take_a_byte_or_half_of_one_also_after_a_record() {
        for (levels, bytes) in [(255, 4 * 9), (15, 4 * 5)] {
            let kept = ErrorBuffer::keep(rest(4, 9), ErrorFeedback::Quantised { levels }).unwrap();
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
