//! Storage of a model's matrices: in f32, in the type of their file, or in codes.

use std::fmt;

use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData};
use lowrank_kernels::host::transpose_into;
use lowrank_kernels::narrow::bf16::{nearest, widened};
use lowrank_kernels::narrow::f16;
use lowrank_kernels::narrow::four_bit::FourBit;
use lowrank_kernels::narrow::ggml::{BlockType, Blocks};
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
    /// 1.06 bytes a weight: integers of 8 bits with a scale in f16 for each 32 inputs, as llama.cpp's `Q8_0`; embedding and head too.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// In the blocks of a GGUF file; as a choice, `file` means them.
    #[serde(skip)]
    Blocks(BlockType),
}

impl BaseStorage {
    /// Those that a user can choose.
    pub const CHOICES: [Self; 6] = [Self::File, Self::F32, Self::Bf16, Self::Int8, Self::Q8_0, Self::Nf4];

    /// Name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Nf4 => "nf4",
            Self::Q8_0 => "q8_0",
            Self::Blocks(_) => "file",
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
            Self::Frozen(BaseStorage::Q8_0) => block_bytes(BlockType::Q8_0, count),
            Self::Frozen(BaseStorage::Blocks(kind)) => block_bytes(kind, count),
            Self::Frozen(BaseStorage::Bf16) | Self::Trained(_) => 2 * count,
        }
    }

    /// Stores the values of a matrix `shape`, given in the model's order. Rejected, with the reason: blocks that do not divide the rows of a
    /// file.
    pub(crate) fn of(self, values: Vec<f32>, shape: [usize; 2], layout: Layout) -> Result<StoredMatrix, String> {
        Ok(match self {
            Self::Wide | Self::Frozen(BaseStorage::File | BaseStorage::F32) | Self::Trained(WeightStorage::F32) => {
                StoredMatrix::Wide(values)
            }
            Self::Frozen(BaseStorage::Int8) | Self::Trained(WeightStorage::Int8) => StoredMatrix::int8(&values, shape),
            Self::Frozen(BaseStorage::Bf16) | Self::Trained(_) => StoredMatrix::bf16(&values),
            Self::Frozen(BaseStorage::Nf4 | BaseStorage::Q8_0) => {
                let values = match layout {
                    Layout::AsStored => values,
                    Layout::Transposed => transpose(&values, shape[0], shape[1]),
                };
                return self.of_file(values, shape, layout);
            }
            // Zero bytes are zeros in every kind of block. Other values have no single right encoding.
            Self::Frozen(BaseStorage::Blocks(kind)) if values.iter().all(|x| *x == 0.0) => {
                let bytes = vec![0; block_bytes(kind, values.len())];
                StoredMatrix::in_codes(Codes::Blocks(Blocks { kind, bytes }), shape, layout)
            }
            Self::Frozen(BaseStorage::Blocks(_)) => StoredMatrix::Wide(values),
        })
    }

    /// [`MatrixStorage::of`] for values in the order of a file, which codes keep.
    pub(crate) fn of_file(self, values: Vec<f32>, shape: [usize; 2], layout: Layout) -> Result<StoredMatrix, String> {
        let [rows, columns] = if layout == Layout::Transposed { [shape[1], shape[0]] } else { shape };
        match self {
            Self::Frozen(BaseStorage::Nf4) => {
                let codes = Codes::FourBit(FourBit::nf4(&values, NF4_BLOCK).double());
                Ok(StoredMatrix::in_codes(codes, shape, layout))
            }
            Self::Frozen(BaseStorage::Q8_0) => {
                let block = BlockType::Q8_0.values();
                if !columns.is_multiple_of(block) {
                    return Err(format!(
                        "has {columns} inputs, which the blocks of {block} of q8_0 do not divide; use int8"
                    ));
                }
                Ok(StoredMatrix::in_codes(Codes::Blocks(Blocks::q8_0(&values)), shape, layout))
            }
            _ if layout == Layout::Transposed => self.of(transpose(&values, rows, columns), shape, layout),
            _ => self.of(values, shape, layout),
        }
    }
}

fn block_bytes(kind: BlockType, count: usize) -> usize {
    count.div_ceil(kind.values()) * kind.bytes()
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

    /// Codes in the order of a file.
    pub(crate) fn in_codes(codes: Codes, shape: [usize; 2], layout: Layout) -> Self {
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
            Self::Half(DType::F16, bits) => bits.into_iter().map(f16::widened).collect(),
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
