//! Tensors of optimizer states in a safetensors file, one at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::path::Path;

use burn::tensor::{DType, Shape, TensorData};
use lowrank_models::hub::read_header;
use lowrank_optim::StateStore;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use super::CheckpointError;

/// Lists the tensors of states before they are written.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Listing {
    tensors: Vec<(String, DType, Vec<usize>, usize)>,
}

impl StateStore for Listing {
    fn put(&mut self, name: String, data: TensorData) {
        self.tensors.push((name, data.dtype(), data.shape().as_slice().to_vec(), data.as_bytes().len()));
    }

    fn get(&mut self, _prefix: &str) -> Vec<(String, TensorData)> {
        Vec::new()
    }
}

impl Listing {
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Name, type and shape of each tensor.
    pub fn entries(&self) -> impl Iterator<Item = (&str, DType, &[usize])> {
        self.tensors.iter().map(|(name, dtype, shape, _)| (name.as_str(), *dtype, shape.as_slice()))
    }

    /// Appends the tensors of another listing.
    pub fn append(&mut self, mut more: Self) {
        self.tensors.append(&mut more.tensors);
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|(.., bytes)| bytes).sum()
    }
}

/// Writes states in the order of a listing.
pub(super) struct Writer {
    file: BufWriter<File>,
    left: std::vec::IntoIter<String>,
    done: Result<()>,
}

impl Writer {
    /// Creates a file with a header for the listed tensors.
    pub fn create(path: &Path, listing: Listing) -> Result<Self> {
        let (mut begin, mut infos, mut names) = (0, Vec::new(), Vec::new());
        for (name, dtype, shape, len) in listing.tensors {
            let info = TensorInfo { dtype: stored(dtype)?, shape, data_offsets: (begin, begin + len) };
            begin += len;
            names.push(name.clone());
            infos.push((name, info));
        }
        let metadata = Metadata::new(None, infos).map_err(Error::other)?;
        let mut header = serde_json::to_vec(&metadata)?;
        // The data starts at a multiple of 8 bytes.
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        Ok(Self { file, left: names.into_iter(), done: Ok(()) })
    }

    /// Returns an error unless all tensors are in the file.
    pub fn finish(&mut self) -> Result<()> {
        std::mem::replace(&mut self.done, Ok(()))?;
        match self.left.next() {
            Some(name) => Err(Error::other(format!("{name} was not written"))),
            None => self.file.flush(),
        }
    }
}

impl StateStore for Writer {
    fn put(&mut self, name: String, data: TensorData) {
        if self.done.is_ok() {
            self.done = match self.left.next() {
                Some(next) if next == name => self.file.write_all(data.as_bytes()),
                next => Err(Error::other(format!("{name} came where {next:?} was listed"))),
            };
        }
    }

    fn get(&mut self, _prefix: &str) -> Vec<(String, TensorData)> {
        Vec::new()
    }
}

/// Reads states.
pub(super) struct Reader {
    file: File,
    begin: u64,
    tensors: BTreeMap<String, TensorInfo>,
    done: Result<()>,
}

impl Reader {
    /// Opens a file; its size must match its header.
    pub fn open(path: &Path) -> std::result::Result<Self, CheckpointError> {
        let (begin, metadata) = read_header(path)?;
        let file = File::open(path).map_err(CheckpointError::io(path))?;
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { file, begin, tensors, done: Ok(()) })
    }

    /// Names of the tensors that have not been read, with type and shape.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// Number of tensors that have not been read.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Returns the first failure to read.
    pub fn finish(&mut self) -> Result<()> {
        std::mem::replace(&mut self.done, Ok(()))
    }

    fn read(&mut self, info: &TensorInfo) -> Result<TensorData> {
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to - from];
        self.file.seek(SeekFrom::Start(self.begin + from as u64))?;
        self.file.read_exact(&mut bytes)?;
        Ok(TensorData::from_bytes_vec(bytes, Shape::from(info.shape.clone()), loaded(info.dtype)?))
    }
}

impl StateStore for Reader {
    fn put(&mut self, _name: String, _data: TensorData) {}

    fn get(&mut self, prefix: &str) -> Vec<(String, TensorData)> {
        let names: Vec<String> = self
            .tensors
            .range(prefix.to_string()..)
            .map(|(name, _)| name)
            .take_while(|n| n.starts_with(prefix))
            .cloned()
            .collect();
        let mut found = Vec::new();
        for name in names {
            let Some(info) = self.tensors.remove(&name) else { continue };
            match self.read(&info) {
                Ok(data) => found.push((name, data)),
                Err(error) => self.done = Err(error),
            }
        }
        found
    }
}

/// Types of state tensors, in memory and in files.
const TYPES: [(DType, Dtype); 10] = [
    (DType::F64, Dtype::F64),
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
    (DType::I64, Dtype::I64),
    (DType::I32, Dtype::I32),
    (DType::I16, Dtype::I16),
    (DType::I8, Dtype::I8),
    (DType::U32, Dtype::U32),
    (DType::U8, Dtype::U8),
];

pub(super) fn stored(dtype: DType) -> Result<Dtype> {
    let found = TYPES.iter().find(|(memory, _)| *memory == dtype);
    found.map(|(_, file)| *file).ok_or_else(|| Error::other(format!("no file holds values of type {dtype:?}")))
}

fn loaded(dtype: Dtype) -> Result<DType> {
    let found = TYPES.iter().find(|(_, file)| *file == dtype);
    found.map(|(memory, _)| *memory).ok_or_else(|| Error::new(ErrorKind::InvalidData, format!("it has type {dtype:?}")))
}
