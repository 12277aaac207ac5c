//! Storage of a model's matrices: in f32, in the type of their file, or in codes.

use std::fmt;

use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData, f16};
use lowrank_kernels::host::transpose_into;
use lowrank_kernels::narrow::bf16::{nearest, widened};
use lowrank_kernels::narrow::four_bit::FourBit;
use lowrank_kernels::narrow::groups::{Rounding, quantise_groups};
use lowrank_kernels::narrow::packed::{Codes, PackedMatrix, carrier};
use lowrank_optim::WeightStorage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::layout::Layout;

/// Values that share a scale as 8-bit integers.
pub const GROUP: usize = 256;
/// Values that share a scale in NF4.
pub const NF4_BLOCK: usize = 64;

/// Storage of frozen weights; vectors stay in f32, and the arithmetic is that of f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BaseStorage {
    /// In the type of the file: bf16, f16 or 4-bit codes as they are, everything else in f32.
    #[default]
    File,
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight, rounded to the nearest.
    Bf16,
    /// 1 byte a weight: integers in groups of 256. Embedding and head keep the type of the file.
    Int8,
    /// Half a byte a weight: codes of a map for normal values, in blocks of 64, their scales in 8 bits. Embedding and head keep the type
    /// of the file.
    Nf4,
}

impl BaseStorage {
    /// Name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Nf4 => "nf4",
        }
    }
}

impl fmt::Display for BaseStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Storage of the matrices of a model that is being built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatrixStorage {
    /// In f32.
    #[default]
    Wide,
    /// Frozen.
    Frozen(BaseStorage),
    /// Trained.
    Trained(WeightStorage),
}

impl MatrixStorage {
    /// Storage of embedding and head.
    pub fn of_tables(self) -> Self {
        match self {
            Self::Frozen(BaseStorage::Int8 | BaseStorage::Nf4) => Self::Frozen(BaseStorage::File),
            Self::Trained(storage) => Self::Trained(storage.of_tables()),
            other => other,
        }
    }

    /// Bytes of a matrix of this number of elements.
    pub fn bytes(self, count: usize) -> usize {
        match self {
            Self::Wide | Self::Frozen(BaseStorage::File | BaseStorage::F32) | Self::Trained(WeightStorage::F32) => {
                4 * count
            }
            Self::Frozen(BaseStorage::Int8) | Self::Trained(WeightStorage::Int8) => count + 5 * count.div_ceil(GROUP),
            Self::Frozen(BaseStorage::Nf4) => FourBit::bytes(count, NF4_BLOCK, true),
            Self::Frozen(BaseStorage::Bf16) | Self::Trained(_) => 2 * count,
        }
    }

    /// Stores the values of a matrix `shape`, given in the model's order.
    pub(crate) fn of(self, values: Vec<f32>, shape: [usize; 2], layout: Layout) -> StoredMatrix {
        match self {
            Self::Wide | Self::Frozen(BaseStorage::File | BaseStorage::F32) | Self::Trained(WeightStorage::F32) => {
                StoredMatrix::Wide(values)
            }
            Self::Frozen(BaseStorage::Bf16) => StoredMatrix::bf16(&values),
            Self::Frozen(BaseStorage::Int8) => StoredMatrix::int8(&values, shape),
            Self::Frozen(BaseStorage::Nf4) => {
                let values = match layout {
                    Layout::AsStored => values,
                    Layout::Transposed => transpose(&values, shape[0], shape[1]),
                };
                StoredMatrix::nf4_of_file(&values, shape, layout)
            }
            Self::Trained(WeightStorage::Int8) => StoredMatrix::int8(&values, shape),
            Self::Trained(_) => StoredMatrix::bf16(&values),
        }
    }
}

/// The values of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub enum StoredMatrix {
    /// In f32, row-major.
    Wide(Vec<f32>),
    /// Bits of bf16 or f16, row-major.
    Half(DType, Vec<u16>),
    /// In codes.
    Packed(PackedMatrix),
}

impl StoredMatrix {
    fn bf16(values: &[f32]) -> Self {
        Self::Half(DType::BF16, values.iter().map(|x| nearest(*x)).collect())
    }

    fn int8(values: &[f32], shape: [usize; 2]) -> Self {
        let codes = Codes::Groups(quantise_groups(values, 8, GROUP, Rounding::Nearest), GROUP);
        Self::Packed(PackedMatrix { shape, transposed: false, codes })
    }

    /// NF4 codes, in the order of a file, of values in that order.
    pub(crate) fn nf4_of_file(values: &[f32], shape: [usize; 2], layout: Layout) -> Self {
        let codes = Codes::FourBit(FourBit::nf4(values, NF4_BLOCK).double());
        Self::Packed(PackedMatrix { shape, transposed: layout == Layout::Transposed, codes })
    }

    /// As a tensor.
    pub(crate) fn tensor(self, shape: [usize; 2], device: &Device) -> Tensor<2> {
        match self {
            Self::Wide(values) => Tensor::from_data(TensorData::new(values, shape), device),
            Self::Half(dtype, bits) => {
                let data = TensorData::from_bytes(Bytes::from_elems(bits), Shape::from(shape), dtype);
                Tensor::from_data(data, (device, dtype))
            }
            Self::Packed(matrix) => carrier(&matrix, device),
        }
    }

    /// The values in f32, in the model's order.
    pub(crate) fn widened(self, shape: [usize; 2]) -> Vec<f32> {
        match self {
            Self::Wide(values) => values,
            Self::Half(DType::F16, bits) => bits.into_iter().map(|bits| f16::from_bits(bits).to_f32()).collect(),
            Self::Half(_, bits) => bits.into_iter().map(widened).collect(),
            Self::Packed(matrix) if matrix.transposed => transpose(&matrix.restored(), shape[1], shape[0]),
            Self::Packed(matrix) => matrix.restored(),
        }
    }

    /// Values of two bytes as a file has them, `rows x columns` there.
    pub(crate) fn halves(bytes: Vec<u8>, dtype: DType, [rows, columns]: [usize; 2], layout: Layout) -> Self {
        let bits: Vec<u16> = bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
        let bits = if layout == Layout::Transposed { transpose(&bits, rows, columns) } else { bits };
        Self::Half(dtype, bits)
    }
}

/// Transposes a row-major `rows x columns` matrix.
pub(crate) fn transpose<T: Copy + Default + Send + Sync>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut out = vec![T::default(); values.len()];
    transpose_into(values, [rows, columns], &mut out);
    out
}
