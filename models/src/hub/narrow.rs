//! Matrices that files hold in fewer bytes than f32, read as they are.

use burn::tensor::{DType, Tensor};
use lowrank_kernels::narrow::four_bit::{FourBit, Scales};
use lowrank_kernels::narrow::groups::QuantisedGroups;
use lowrank_kernels::narrow::packed::{Codes, PackedMatrix, packed};
use lowrank_optim::WeightStorage;
use safetensors::Dtype;

use super::four_bit::{self, STATE, State};
use super::gguf::{BlockType, GgufFile};
use super::read::ModelFolder;
use super::tensor_files::TensorFiles;
use crate::error::ModelError;
use crate::layout::Layout;
use crate::storage::{BaseStorage, GROUP, MatrixStorage, StoredMatrix};

/// Ends of the names of what restores 8-bit integers.
const SCALES: &str = ".scales";
const ZEROS: &str = ".zeros";

impl ModelFolder {
    /// Storage that the matrices of its blocks have in the file.
    pub fn stores(&self) -> Result<BaseStorage, ModelError> {
        let Some(files) = self.headers()? else {
            return Ok(self.gguf.as_ref().map_or(BaseStorage::F32, blocks_of));
        };
        let of = |is: &dyn Fn(&str) -> bool| files.names().any(is);
        Ok(match () {
            () if of(&|name| name.contains(STATE)) => BaseStorage::Nf4,
            () if of(&|name| name.ends_with(ZEROS)) => BaseStorage::Int8,
            () if of(&|name| {
                matches!(files.dtype(name), Some(Dtype::BF16 | Dtype::F16)) && name.ends_with("_proj.weight")
            }) =>
            {
                BaseStorage::Bf16
            }
            () => BaseStorage::F32,
        })
    }
}

/// Storage of the matrices of a GGUF file's blocks, for forecasts. Files mix types: the one that takes as many bytes a weight as they do
/// together, or the next larger one.
fn blocks_of(file: &GgufFile) -> BaseStorage {
    let (mut values, mut bytes) = (0, 0);
    for (name, shape, kind) in file.tensors() {
        if name.starts_with("blk.") && shape.len() == 2 {
            let count: usize = shape.iter().product();
            values += count;
            bytes += count / kind.block_values() * kind.block_bytes();
        }
    }
    let takes = |kind: BlockType| values * kind.bytes() >= bytes * kind.values();
    let fitting = BlockType::ALL.into_iter().filter(|kind| takes(*kind));
    match fitting.min_by(|a, b| (a.bytes() * b.values()).cmp(&(b.bytes() * a.values()))) {
        Some(kind) => BaseStorage::Blocks(kind),
        None if bytes <= 2 * values => BaseStorage::Bf16,
        None => BaseStorage::F32,
    }
}

impl TensorFiles {
    /// A matrix whose bytes in the file serve a storage, or that has to be restored; none if it is to be read as floats.
    pub(super) fn narrow(
        &mut self,
        name: &str,
        shape @ [d_in, d_out]: [usize; 2],
        layout: Layout,
        storage: MatrixStorage,
    ) -> Result<Option<StoredMatrix>, ModelError> {
        let packed = match self.four_bit(name, shape)? {
            Some(packed) => Some(packed),
            None => self.integers(name, shape)?,
        };
        if let Some(packed) = packed {
            let stays = matches!(
                (&packed.codes, storage),
                (Codes::FourBit(_), MatrixStorage::Frozen(BaseStorage::File | BaseStorage::Nf4))
                    | (Codes::Groups(..), MatrixStorage::Frozen(BaseStorage::File | BaseStorage::Int8))
                    | (Codes::Groups(..), MatrixStorage::Trained(WeightStorage::Int8))
            );
            let stored = StoredMatrix::Packed(packed);
            return match stays {
                true => Ok(Some(stored)),
                false => {
                    let stored = storage.of(stored.widened(shape), shape, layout);
                    stored.map(Some).map_err(|reason| self.tensor_error(name, reason))
                }
            };
        }
        let dtype = match self.dtype(name) {
            Some(Dtype::BF16) => DType::BF16,
            Some(Dtype::F16) => DType::F16,
            _ => return Ok(None),
        };
        let stays = match storage {
            MatrixStorage::Frozen(BaseStorage::File) => true,
            MatrixStorage::Frozen(BaseStorage::Bf16) => dtype == DType::BF16,
            MatrixStorage::Trained(WeightStorage::F32 | WeightStorage::Int8) => false,
            MatrixStorage::Trained(_) => dtype == DType::BF16,
            _ => false,
        };
        if !stays {
            return Ok(None);
        }
        let sides = if layout == Layout::Transposed { [d_out, d_in] } else { [d_in, d_out] };
        Ok(Some(StoredMatrix::halves(self.entry(name, &sides)?.0, dtype, sides, layout)))
    }

    /// The codes of a weight `[d_in, d_out]`, taken off the list with all that belongs to them; none if it is stored whole.
    fn four_bit(&mut self, name: &str, [d_in, d_out]: [usize; 2]) -> Result<Option<PackedMatrix>, ModelError> {
        let start = format!("{name}{STATE}");
        let states: Vec<String> = self.names().filter(|key| key.starts_with(&start)).map(str::to_string).collect();
        let [key] = states.as_slice() else {
            return match states.len() {
                0 => Ok(None),
                _ => Err(self.tensor_error(name, format!("has {} and {}", states[0], states[1]))),
            };
        };
        let state = State::parse(&self.whole(key, None)?.0).map_err(|reason| self.tensor_error(key, reason))?;
        if !["nf4", "fp4"].contains(&state.kind.as_str()) || !key.ends_with(&state.kind) {
            let reason = format!("has quant_type \"{}\"; nf4 and fp4 can be read, under their own names", state.kind);
            return Err(self.tensor_error(key, reason));
        }
        if state.shape != [d_out, d_in] {
            let reason = format!("has shape {:?}; the configuration asks for [{d_out}, {d_in}]", state.shape);
            return Err(self.tensor_error(key, reason));
        }
        let count = d_in * d_out;
        let blocks = count.div_ceil(state.block);
        let (packed, _) = self.whole(name, Some(count.div_ceil(2)))?;
        let map = self.floats(&format!("{name}.quant_map"), 16)?;
        let map = map.try_into().map_err(|_| self.tensor_error(name, "has a map of other than 16 values".into()))?;
        let scales = match state.nested {
            None => Scales::Plain(self.floats(&format!("{name}.absmax"), blocks)?),
            Some((nested_block, offset)) => {
                let key = format!("{name}.absmax");
                let (codes, dtype) = self.whole(&key, Some(blocks))?;
                if dtype != Dtype::U8 {
                    return Err(self.tensor_error(&key, format!("has type {dtype:?}; with nested scales it is U8")));
                }
                let nested = self.floats(&format!("{name}.nested_absmax"), blocks.div_ceil(nested_block))?;
                let map = self.floats(&format!("{name}.nested_quant_map"), 256)?;
                let map = map
                    .try_into()
                    .map_err(|_| self.tensor_error(name, "has a nested map of other than 256 values".into()))?;
                Scales::Double { codes, nested, map: Box::new(map), offset }
            }
        };
        let codes = Codes::FourBit(FourBit { packed, map, block: state.block, count, scales });
        Ok(Some(PackedMatrix { shape: [d_in, d_out], transposed: true, codes }))
    }

    /// All bytes of a tensor, whatever its type and shape, and its type.
    fn whole(&mut self, name: &str, expected: Option<usize>) -> Result<(Vec<u8>, Dtype), ModelError> {
        let shape = self.shape(name).ok_or_else(|| self.tensor_error(name, "is missing".into()))?.to_vec();
        let (bytes, dtype) = self.entry(name, &shape)?;
        match expected {
            Some(expected) if expected != bytes.len() => Err(self
                .tensor_error(name, format!("has {} bytes; its quantisation state asks for {expected}", bytes.len()))),
            _ => Ok((bytes, dtype)),
        }
    }

    fn floats(&mut self, name: &str, count: usize) -> Result<Vec<f32>, ModelError> {
        let values = self.take(name, &[count])?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(place) => Err(self.tensor_error(name, format!("has the value {} at {place}", values[place]))),
        }
    }

    /// 8-bit integers as this library stores trained weights, in the model's order; none if the tensor has another type.
    fn integers(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<PackedMatrix>, ModelError> {
        let scales = format!("{name}{SCALES}");
        if self.dtype(name) != Some(Dtype::U8) || self.dtype(&scales).is_none() {
            return Ok(None);
        }
        let groups = (shape[0] * shape[1]).div_ceil(GROUP);
        let (codes, _) = self.entry(name, &shape)?;
        let scales = self.take(&scales, &[groups])?;
        let zeros = format!("{name}{ZEROS}");
        let (zeros, dtype) = self.entry(&zeros, &[groups])?;
        if dtype != Dtype::U8 {
            return Err(self.tensor_error(name, format!("has zeros of type {dtype:?}; they are U8")));
        }
        if let Some(place) = scales.iter().position(|scale| !scale.is_finite() || *scale <= 0.0) {
            return Err(self.tensor_error(name, format!("has the scale {} in group {place}", scales[place])));
        }
        let zeros = zeros.into_iter().map(f32::from).collect();
        let codes = Codes::Groups(QuantisedGroups { codes, scales, zeros }, GROUP);
        Ok(Some(PackedMatrix { shape, transposed: false, codes }))
    }
}

/// Name, type, shape and bytes of a tensor.
pub(super) type Part = (String, Dtype, Vec<usize>, Vec<u8>);

/// The tensors that files have for a matrix in codes.
pub(super) fn parts(name: &str, tensor: &Tensor<2>) -> Vec<Part> {
    let Some(matrix) = packed(tensor) else { unreachable!("the tensor holds codes") };
    match &matrix.codes {
        Codes::FourBit(_) => four_bit::tensors(name, &matrix, "float32"),
        // Folders have no such blocks.
        Codes::Blocks(blocks) => {
            let [rows, columns] = matrix.shape;
            let shape = if matrix.transposed { vec![columns, rows] } else { vec![rows, columns] };
            let bytes = blocks.restored().iter().flat_map(|x| x.to_le_bytes()).collect();
            vec![(name.to_string(), Dtype::F32, shape, bytes)]
        }
        Codes::Groups(groups, _) => {
            let (count, scales) = (groups.scales.len(), groups.scales.iter().flat_map(|x| x.to_le_bytes()).collect());
            let zeros = groups.zeros.iter().map(|zero| *zero as u8).collect();
            vec![
                (name.to_string(), Dtype::U8, matrix.shape.to_vec(), groups.codes.clone()),
                (format!("{name}{SCALES}"), Dtype::F32, vec![count], scales),
                (format!("{name}{ZEROS}"), Dtype::U8, vec![count], zeros),
            ]
        }
    }
}
