//! Writing model folders.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Int, Tensor, bf16, f16};
use lowrank_kernels::narrow::packed::{Codes, holds_codes, packed};
use lowrank_optim::ModulePath;
use safetensors::tensor::{Dtype, View};
use serde_json::{Map, Value, json};

use super::config::HubConfig;
use super::file_type::{FileType, FileTypes};
use super::names::{CONFIG, EXACT, INDEX, WEIGHTS};
use super::{four_bit, narrow};
use crate::error::ModelError;
use crate::llama::Llama;
use crate::storage::transpose;
use crate::weights::host;

/// Size limit of a shard, the usual one of Hugging Face's tools.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Writes `config.json` and the weights in f32 into an existing folder; see [`save_as`].
pub fn save(model: &Llama, extra: &Map<String, Value>, dir: &Path, max_shard_bytes: u64) -> Result<(), ModelError> {
    save_as(model, extra, &FileTypes::default(), dir, max_shard_bytes)
}

/// Writes `config.json` and the weights, each in its type, into an existing folder.
///
/// `extra` are further keys of `config.json`, for example `eos_token_id`. Files of the same names are replaced, one after the other: use
/// a new folder and rename it when an interruption must not leave half a model. A model with adapters is rejected, and so are values beyond
/// the range of their type.
pub fn save_as(
    model: &Llama,
    extra: &Map<String, Value>,
    types: &FileTypes,
    dir: &Path,
    max_shard_bytes: u64,
) -> Result<(), ModelError> {
    let config = HubConfig { llama: model.config().clone(), extra: extra.clone() };
    let mut config = config.checked_json(types.usual())?;
    if holds_four_bit(model) {
        config = four_bit::with_account(&config);
    }
    save_weights(model, &Names::default(), types, dir, max_shard_bytes)?;
    write_text(&dir.join(CONFIG), &config)
}

/// Names of parameters in files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    /// The name in the file of the parameter with this path.
    pub of: fn(&str) -> String,
    /// Names of vectors of one element that files store as scalars.
    pub scalars: &'static [&'static str],
}

impl Default for Names {
    fn default() -> Self {
        Self { of: str::to_string, scalars: &[] }
    }
}

/// Writes the weights of a model into an existing folder, whole or in shards; see [`save_as`].
pub(super) fn save_weights<M: Module>(
    model: &M,
    names: &Names,
    types: &FileTypes,
    dir: &Path,
    max_shard_bytes: u64,
) -> Result<(), ModelError> {
    let tensors = with_codes(collected(model, names, types)?);
    for (name, tensor) in &tensors {
        tensor.check_range().map_err(|reason| ModelError::Tensor {
            path: dir.to_path_buf(),
            tensor: name.clone(),
            reason,
        })?;
    }
    let shards = split(tensors, max_shard_bytes);
    let count = shards.len();
    let mut index = BTreeMap::new();
    let mut total = 0;
    for (number, shard) in shards.into_iter().enumerate() {
        let file = match count {
            1 => WEIGHTS.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        for (name, tensor) in &shard {
            index.insert(name.clone(), file.clone());
            total += tensor.data_len();
        }
        write_shard(shard, &dir.join(file))?;
    }
    if count > 1 {
        let text = format!("{:#}\n", json!({"metadata": {"total_size": total}, "weight_map": index}));
        write_text(&dir.join(INDEX), &text)?;
    }
    Ok(())
}

/// Writes a model that goes on being trained: as [`save_as`], and where that rounds values, the exact ones in a file beside them, which
/// [`ModelFolder::load_trained`](super::ModelFolder::load_trained) prefers.
pub fn save_trained(
    model: &Llama,
    extra: &Map<String, Value>,
    types: &FileTypes,
    dir: &Path,
    max_shard_bytes: u64,
) -> Result<(), ModelError> {
    save_as(model, extra, types, dir, max_shard_bytes)?;
    let is_exact = collected(model, &Names::default(), types)?.iter().all(|(_, tensor)| tensor.is_exact());
    match is_exact {
        true => Ok(()),
        false => write_shard(with_codes(collected(model, &Names::default(), &FileTypes::held())?), &dir.join(EXACT)),
    }
}

pub(super) fn write_text(path: &Path, text: &str) -> Result<(), ModelError> {
    std::fs::write(path, text).map_err(ModelError::io(path))
}

fn write_shard(shard: Vec<(String, Stored)>, path: &Path) -> Result<(), ModelError> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    // The library makes files for their owner alone; a file created directly has the permissions that the umask allows.
    let permissions = File::create(path).and_then(|file| file.metadata()).map_err(ModelError::io(path))?.permissions();
    safetensors::serialize_to_file(shard, Some(metadata), path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => ModelError::Io { path: path.to_path_buf(), source },
        other => ModelError::File { path: path.to_path_buf(), reason: other.to_string() },
    })?;
    std::fs::set_permissions(path, permissions).map_err(ModelError::io(path))
}

/// Fills shards in order; a tensor larger than the limit gets a shard of its own.
fn split(tensors: Vec<(String, Stored)>, limit: u64) -> Vec<Vec<(String, Stored)>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for (name, tensor) in tensors {
        let bytes = tensor.data_len() as u64;
        if filled > 0 && filled + bytes > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = shards.last_mut() {
            last.push((name, tensor));
        }
    }
    shards
}

/// The tensors of a model under their names in files. A model with adapters is rejected.
pub(super) fn collected<M: Module>(
    model: &M,
    names: &Names,
    types: &FileTypes,
) -> Result<Vec<(String, Stored)>, ModelError> {
    let mut collector = Collector { path: ModulePath::default(), names, types, tensors: Vec::new(), adapted: None };
    model.visit(&mut collector);
    match collector.adapted {
        Some(path) => Err(ModelError::Adapted { path }),
        None => Ok(collector.tensors),
    }
}

/// A tensor that is converted to the order of the file only when it is written.
pub(super) struct Stored {
    /// Values in the model's order.
    flat: Flat,
    /// Shape in the file.
    shape: Vec<usize>,
    /// True if the file stores the transposed matrix.
    transposed: bool,
}

/// Contiguous elements, or codes.
enum Flat {
    Float(Tensor<1>, FileType),
    /// A matrix in codes.
    Codes(Tensor<2>),
    /// One of the tensors that files have for a matrix in codes.
    Part {
        name: String,
        tensor: Tensor<2>,
        part: usize,
        dtype: Dtype,
        len: usize,
    },
    Whole(Tensor<1, Int>),
}

impl Stored {
    /// Values in the order of the file; positions as numbers.
    pub fn values(&self) -> Vec<f32> {
        match &self.flat {
            Flat::Float(flat, _) if !self.transposed => host(flat.clone()),
            Flat::Float(flat, _) => transpose(&host(flat.clone()), self.shape[1], self.shape[0]),
            Flat::Whole(whole) => host(whole.clone().float()),
            Flat::Codes(tensor) | Flat::Part { tensor, .. } if self.transposed => host(tensor.clone().transpose()),
            Flat::Codes(tensor) | Flat::Part { tensor, .. } => host(tensor.clone()),
        }
    }

    /// Returns true if the type of the file holds all values.
    fn is_exact(&self) -> bool {
        match &self.flat {
            Flat::Float(flat, kind) => match flat.dtype() {
                DType::BF16 => *kind != FileType::F16,
                DType::F16 => *kind != FileType::BF16,
                _ => *kind == FileType::F32,
            },
            _ => true,
        }
    }
}

/// Returns true if a model has weights in 4-bit codes.
fn holds_four_bit(model: &Llama) -> bool {
    #[derive(Default)]
    struct Any(bool);
    impl ModuleVisitor for Any {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if !self.0 && holds_codes(&param.base()) {
                let codes = packed(&Tensor::from_dispatch(param.base().into_dispatch())).map(|matrix| matrix.codes);
                self.0 = matches!(codes, Some(Codes::FourBit(_)));
            }
        }
    }
    let mut any = Any::default();
    model.visit(&mut any);
    any.0
}

/// Matrices in codes as the tensors that files have for them, each made when it is written.
fn with_codes(tensors: Vec<(String, Stored)>) -> Vec<(String, Stored)> {
    let mut all = Vec::new();
    for (name, stored) in tensors {
        let Flat::Codes(tensor) = &stored.flat else {
            all.push((name, stored));
            continue;
        };
        for (part, (part_name, dtype, shape, bytes)) in narrow::parts(&name, tensor).into_iter().enumerate() {
            let flat = Flat::Part { name: name.clone(), tensor: tensor.clone(), part, dtype, len: bytes.len() };
            all.push((part_name, Stored { flat, shape, transposed: false }));
        }
    }
    all
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        match &self.flat {
            Flat::Float(_, kind) => kind.dtype(),
            Flat::Whole(_) => Dtype::I32,
            Flat::Part { dtype, .. } => *dtype,
            Flat::Codes(_) => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let (flat, kind) = match &self.flat {
            Flat::Float(flat, kind) => (flat, *kind),
            Flat::Whole(whole) => return Cow::Owned(whole.to_data().convert::<i32>().as_bytes().to_vec()),
            Flat::Part { name, tensor, part, .. } => {
                return Cow::Owned(narrow::parts(name, tensor).swap_remove(*part).3);
            }
            Flat::Codes(_) => unreachable!("codes are divided into the tensors of a file"),
        };
        let data = flat.to_data().convert::<f32>();
        let values = match data.as_slice::<f32>() {
            Ok(values) => values,
            Err(error) => unreachable!("data converted to f32 is f32: {error:?}"),
        };
        let (rows, columns) = match self.transposed {
            false => (1, values.len()),
            true => (self.shape[1], self.shape[0]),
        };
        Cow::Owned(match kind {
            FileType::F32 => transposed_bytes(values, rows, columns, f32::to_le_bytes),
            FileType::F16 => transposed_bytes(values, rows, columns, |value| f16::from_f32(value).to_le_bytes()),
            FileType::BF16 => transposed_bytes(values, rows, columns, |value| bf16::from_f32(value).to_le_bytes()),
        })
    }

    fn data_len(&self) -> usize {
        let bytes = match &self.flat {
            Flat::Part { len, .. } => return *len,
            Flat::Float(_, kind) => kind.bytes(),
            Flat::Whole(_) | Flat::Codes(_) => 4,
        };
        bytes * self.shape.iter().product::<usize>()
    }
}

impl Stored {
    /// Rejects finite values that the type of the file would turn into infinite ones.
    fn check_range(&self) -> Result<(), String> {
        let (flat, kind) = match &self.flat {
            Flat::Float(flat, kind) if flat.dims()[0] > 0 && flat.dtype() == DType::F32 => (flat, *kind),
            _ => return Ok(()),
        };
        let largest = match kind {
            FileType::F32 => return Ok(()),
            FileType::F16 => f16::MAX.to_f32(),
            FileType::BF16 => bf16::MAX.to_f32(),
        };
        match flat.clone().abs().max().into_scalar::<f32>() {
            value if value.is_finite() && value > largest => {
                Err(format!("has the value {value}, beyond the range of {}; write f32 (--dtype f32)", kind.name()))
            }
            _ => Ok(()),
        }
    }
}

/// The bytes of a row-major `rows x columns` matrix in the transposed order, without an intermediate copy: in tiles that stay in the cache.
fn transposed_bytes<const N: usize>(
    values: &[f32],
    rows: usize,
    columns: usize,
    bytes: impl Fn(f32) -> [u8; N],
) -> Vec<u8> {
    const TILE: usize = 32;
    if rows == 1 {
        return values.iter().flat_map(|value| bytes(*value)).collect();
    }
    let mut out = vec![0; N * values.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..columns).step_by(TILE) {
            for r in r0..rows.min(r0 + TILE) {
                for c in c0..columns.min(c0 + TILE) {
                    out[N * (c * rows + r)..][..N].copy_from_slice(&bytes(values[r * columns + c]));
                }
            }
        }
    }
    out
}

/// Returns true if files store the parameter with this path and number of dimensions transposed, as those of linear layers.
pub(super) fn is_transposed(path: &ModulePath, dimensions: usize) -> bool {
    let linear = |container: &str| container == "Enum:Linear" || container == "Struct:Dense";
    dimensions == 2 && path.containers().any(linear)
}

/// Collects the parameters under the names of their paths.
struct Collector<'a> {
    path: ModulePath,
    names: &'a Names,
    types: &'a FileTypes,
    tensors: Vec<(String, Stored)>,
    /// The first parameter that carries an adapter, ours or Burn's.
    adapted: Option<String>,
}

impl Collector<'_> {
    fn name(&self) -> String {
        (self.names.of)(&self.path.joined())
    }
}

impl ModuleVisitor for Collector<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == "Reparameterization" {
            self.adapted.get_or_insert_with(|| self.path.joined());
        }
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // An adapter would compose the weight.
        let tensor = param.base().inner();
        let mut shape = tensor.dims().to_vec();
        let transposed = is_transposed(&self.path, D);
        if transposed {
            shape.reverse();
        }
        let name = self.name();
        if holds_codes(&tensor) {
            let flat = Flat::Codes(Tensor::from_dispatch(tensor.into_dispatch()));
            return self.tensors.push((name, Stored { flat, shape, transposed }));
        }
        let own = match tensor.dtype() {
            DType::BF16 => FileType::BF16,
            DType::F16 => FileType::F16,
            _ => FileType::F32,
        };
        let flat = tensor.reshape([shape.iter().product::<usize>()]);
        if self.names.scalars.contains(&name.as_str()) {
            shape.clear();
        }
        let kind = if self.types.are_held() { own } else { self.types.get(&name) };
        self.tensors.push((name, Stored { flat: Flat::Float(flat, kind), shape, transposed }));
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.val();
        let shape = tensor.dims().to_vec();
        let flat = Flat::Whole(tensor.reshape([shape.iter().product::<usize>()]));
        self.tensors.push((self.name(), Stored { flat, shape, transposed: false }));
    }
}
