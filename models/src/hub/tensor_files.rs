//! Tensors in safetensors files: one file, or all shards of a folder.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Shape, TensorData};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::file_type::{FileType, FileTypes};
use super::names::{INDEX, WEIGHTS};
use super::open::{open, read_text};
use crate::error::ModelError;
use crate::storage::{MatrixStorage, StoredMatrix};
use crate::weights::{Choose, Init, Layout, WeightSource};

/// The tensors of a folder, each read once from the file that holds it.
#[derive(Debug)]
pub struct TensorFiles {
    dir: PathBuf,
    tensors: BTreeMap<String, (PathBuf, u64, TensorInfo)>,
}

impl TensorFiles {
    /// Reads the headers of `model.safetensors`, or of all shards that `model.safetensors.index.json` names.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        Ok(Self::read(dir, weight_files(dir)?)?.0)
    }

    /// Reads the header of one file: its tensors and its metadata.
    pub fn of_file(path: &Path) -> Result<(Self, HashMap<String, String>), ModelError> {
        Self::read(path, vec![path.to_path_buf()])
    }

    fn read(dir: &Path, paths: Vec<PathBuf>) -> Result<(Self, HashMap<String, String>), ModelError> {
        let (mut tensors, mut beside) = (BTreeMap::new(), HashMap::new());
        for path in paths {
            let (begin, metadata) = read_header(&path)?;
            beside.extend(metadata.metadata().clone().unwrap_or_default());
            for (name, info) in metadata.tensors() {
                let earlier = tensors.insert(name.clone(), (path.clone(), begin, info.clone()));
                if let Some((other, ..)) = earlier {
                    return Err(ModelError::Tensor {
                        path,
                        tensor: name,
                        reason: format!("is also in {}", other.display()),
                    });
                }
            }
        }
        Ok((Self { dir: dir.to_path_buf(), tensors }, beside))
    }

    /// Names and shapes of the tensors that have not been read.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|(name, (_, _, info))| (name.as_str(), info.shape.as_slice()))
    }

    /// Names of the tensors that have not been read.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor that has not been read.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.tensors.get(name)?.2.shape)
    }

    /// Type of a tensor that has not been read.
    pub(super) fn dtype(&self, name: &str) -> Option<Dtype> {
        Some(self.tensors.get(name)?.2.dtype)
    }

    /// Returns true if a tensor of this name has not been read.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Types of the floating-point tensors that have not been read; those of 64 bits count as f32.
    pub fn types(&self) -> FileTypes {
        let kinds = self.tensors.iter().filter_map(|(name, (_, _, info))| {
            let kind = match info.dtype {
                Dtype::F32 | Dtype::F64 => FileType::F32,
                Dtype::F16 => FileType::F16,
                Dtype::BF16 => FileType::BF16,
                _ => return None,
            };
            Some((name.as_str(), kind, (info.data_offsets.1 - info.data_offsets.0) as u64))
        });
        FileTypes::of(kinds)
    }

    /// Reads a tensor as f32 and takes it off the list.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let (bytes, dtype) = self.entry(name, shape)?;
        if bytes.is_empty() {
            // An empty buffer is not aligned for reading numbers.
            return Ok(Vec::new());
        }
        let dtype = match dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            other => {
                return Err(self.tensor_error(name, format!("has type {other:?}; only floating point can be read")));
            }
        };
        let data = TensorData::from_bytes_vec(bytes, Shape::from(shape.to_vec()), dtype).convert::<f32>();
        data.try_into_vec::<f32>().map_err(|error| self.tensor_error(name, format!("{error:?}")))
    }

    /// Reads whole numbers as f32 and takes them off the list. Rejects numbers that f32 cannot represent.
    pub fn take_whole(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let (bytes, dtype) = match self.tensors.get(name) {
            Some((_, _, info)) if !matches!(info.dtype, Dtype::I32 | Dtype::I64) => return self.take(name, shape),
            _ => self.entry(name, shape)?,
        };
        let wide: Vec<i64> = match dtype {
            Dtype::I32 => bytes.as_chunks().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
            _ => bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
        };
        match wide.iter().find(|number| number.unsigned_abs() > 1 << 24) {
            Some(number) => Err(self.tensor_error(name, format!("has the number {number}; 16777216 is the largest"))),
            None => Ok(wide.into_iter().map(|number| number as f32).collect()),
        }
    }

    /// Gives tensors other names. Rejects two that would have the same.
    pub(super) fn rename(&mut self, name: impl Fn(&str) -> String) -> Result<(), ModelError> {
        for (old, tensor) in std::mem::take(&mut self.tensors) {
            let new = name(&old);
            if self.tensors.contains_key(&new) {
                return Err(self.tensor_error(&old, format!("is in the file twice, as {new} too")));
            }
            self.tensors.insert(new, tensor);
        }
        Ok(())
    }

    /// Reads whole numbers of four or eight bytes and takes them off the list.
    fn take_positions(&mut self, name: &str, count: usize) -> Result<Vec<i32>, ModelError> {
        let (bytes, dtype) = self.entry(name, &[count])?;
        match dtype {
            Dtype::I32 => Ok(bytes.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect()),
            Dtype::I64 => {
                let wide = bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
                wide.map(|position| {
                    let fits = i32::try_from(position);
                    fits.map_err(|_| self.tensor_error(name, format!("has position {position}")))
                })
                .collect()
            }
            other => Err(self.tensor_error(name, format!("has type {other:?}; positions are whole numbers"))),
        }
    }

    /// Bytes and type of a tensor, which is taken off the list.
    pub(super) fn entry(&mut self, name: &str, shape: &[usize]) -> Result<(Vec<u8>, Dtype), ModelError> {
        let Some((path, begin, info)) = self.tensors.remove(name) else {
            return Err(self.tensor_error(name, "is missing".into()));
        };
        if info.shape != shape {
            let reason = format!("has shape {:?}; the configuration asks for {shape:?}", info.shape);
            return Err(self.tensor_error(name, reason));
        }
        Ok((read_bytes(&path, begin, &info)?, info.dtype))
    }

    /// Rejects tensors that were not used.
    pub fn finish(&self) -> Result<(), ModelError> {
        match self.tensors.len() {
            0 => Ok(()),
            count => Err(ModelError::Tensor {
                path: self.dir.clone(),
                tensor: self.tensors.keys().take(3).cloned().collect::<Vec<_>>().join(", "),
                reason: format!("has no place in this model ({count} such)"),
            }),
        }
    }

    /// Removes tensors from the list that the model does not use.
    pub(super) fn ignore(&mut self, needless: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| !needless(name));
    }

    /// Some programs write a tied head twice; a copy that differs is not tied.
    pub(super) fn drop_tied_copy(&mut self, copy: &str, original: &str) -> Result<(), ModelError> {
        let (Some(head), Some(table)) = (self.tensors.get(copy).cloned(), self.tensors.get(original).cloned()) else {
            return Ok(());
        };
        let same = self.take(copy, &head.2.shape)? == self.take(original, &table.2.shape)?;
        if !same {
            let reason = format!("differs from {original}, but tie_word_embeddings is true");
            return Err(self.tensor_error(copy, reason));
        }
        self.tensors.insert(original.to_string(), table);
        Ok(())
    }

    pub(super) fn tensor_error(&self, name: &str, reason: String) -> ModelError {
        ModelError::Tensor { path: self.dir.clone(), tensor: name.to_string(), reason }
    }
}

impl WeightSource for TensorFiles {
    fn matrix(&mut self, path: &str, shape: [usize; 2], layout: Layout, init: Init) -> Result<Vec<f32>, ModelError> {
        Ok(self.stored(path, shape, layout, init, MatrixStorage::Wide)?.widened(shape))
    }

    fn stored(
        &mut self,
        path: &str,
        shape: [usize; 2],
        layout: Layout,
        _init: Init,
        storage: MatrixStorage,
    ) -> Result<StoredMatrix, ModelError> {
        if let Some(stored) = self.narrow(path, shape, layout, storage)? {
            return Ok(stored);
        }
        let [rows, columns] = if layout == Layout::Transposed { [shape[1], shape[0]] } else { shape };
        let values = self.take(path, &[rows, columns])?;
        storage.of_file(values, shape, layout).map_err(|reason| self.tensor_error(path, reason))
    }

    fn vector(&mut self, path: &str, len: usize, _init: Init) -> Result<Vec<f32>, ModelError> {
        self.take(path, &[len])
    }

    fn tensor(&mut self, path: &str, shape: &[usize], _init: Init) -> Result<Vec<f32>, ModelError> {
        self.take(path, shape)
    }

    fn positions(&mut self, path: &str, count: usize, below: usize, _: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        let positions = self.take_positions(path, count)?;
        for (place, position) in positions.iter().enumerate() {
            if usize::try_from(*position).map_or(true, |position| position >= below) {
                return Err(self.tensor_error(path, format!("has position {position}; there are {below}, from 0")));
            }
            if place > 0 && positions[place - 1] >= *position {
                let reason = format!("has {position} after {}; positions must ascend", positions[place - 1]);
                return Err(self.tensor_error(path, reason));
            }
        }
        Ok(positions)
    }
}

fn read_bytes(path: &Path, begin: u64, info: &TensorInfo) -> Result<Vec<u8>, ModelError> {
    let (from, to) = info.data_offsets;
    let mut bytes = vec![0; to - from];
    let mut file = open(path)?;
    file.seek(SeekFrom::Start(begin + from as u64)).map_err(ModelError::io(path))?;
    file.read_exact(&mut bytes).map_err(ModelError::io(path))?;
    Ok(bytes)
}

fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let (index, single) = (dir.join(INDEX), dir.join(WEIGHTS));
    if !index.exists() {
        return if single.exists() { Ok(vec![single]) } else { Err(without_weights(dir)) };
    }
    let text = read_text(&index)?;
    let bad = |reason: String| ModelError::File { path: index.clone(), reason };
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(format!("not JSON: {error}")))?;
    let map = value["weight_map"].as_object().ok_or_else(|| bad("has no object weight_map".into()))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|file| !file.contains(['/', '\\']));
        let file = file.ok_or_else(|| bad(format!("weight_map.{tensor} is not the name of a file")))?;
        names.push(dir.join(file));
    }
    names.sort();
    names.dedup();
    if single.exists() && names != [single] {
        return Err(ModelError::File {
            path: dir.to_path_buf(),
            reason: format!(
                "has {WEIGHTS}, and {INDEX} with other files; nothing says which are the weights: move the older ones away"
            ),
        });
    }
    Ok(names)
}

fn without_weights(dir: &Path) -> ModelError {
    if dir.is_file() {
        let reason = format!(
            "is a file, and a folder is needed here; make one of a GGUF file first: lowrank export --model {} --out DIR",
            dir.display()
        );
        return ModelError::File { path: dir.to_path_buf(), reason };
    }
    match PICKLED.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        Some(path) => ModelError::File {
            path,
            reason: format!(
                "is a pickle file, which may run code; let transformers save the model as {WEIGHTS}: \
                 AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
            ),
        },
        None => ModelError::File {
            path: dir.to_path_buf(),
            reason: format!("has no weights: neither {WEIGHTS} nor {INDEX}"),
        },
    }
}

/// Files of weights in an unsupported format.
const PICKLED: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// The header of a safetensors file and the offset of its data. Checks the size of the file against it.
pub fn read_header(path: &Path) -> Result<(u64, Metadata), ModelError> {
    let bad = |reason: String| ModelError::File { path: path.to_path_buf(), reason };
    let mut file = open(path)?;
    let size = file.metadata().map_err(ModelError::io(path))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| bad("is too short for a safetensors file".into()))?;
    let header_len = u64::from_le_bytes(length);
    if header_len > size.saturating_sub(8) {
        return Err(bad("is no safetensors file, or is truncated: the header is longer than the file".into()));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(ModelError::io(path))?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| bad(format!("has a broken safetensors header: {error}")))?;
    let begin = 8 + header_len;
    let expected = begin + metadata.data_len() as u64;
    if expected != size {
        return Err(bad(format!("has {size} bytes; its header says {expected}: truncated or changed, fetch it again")));
    }
    Ok((begin, metadata))
}
