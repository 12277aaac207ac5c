//! A safetensors file whose tensors are written one after the other: only the current one is in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::error::ModelError;

/// A file in the making. The data is collected beside it, because the header comes first in the file.
pub(super) struct TensorSpool {
    path: PathBuf,
    data: PathBuf,
    file: BufWriter<File>,
    header: Map<String, Value>,
    end: u64,
}

impl TensorSpool {
    /// Starts a file; its folder exists.
    pub fn create(path: &Path) -> Result<Self, ModelError> {
        let data = path.with_extension("data");
        let file = BufWriter::new(File::create(&data).map_err(ModelError::io(&data))?);
        Ok(Self { path: path.to_path_buf(), data, file, header: Map::new(), end: 0 })
    }

    /// Appends a tensor in f32.
    pub fn push(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<(), ModelError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push_bytes(name, Dtype::F32, shape, &bytes)
    }

    /// Appends a tensor of any type.
    pub fn push_bytes(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<(), ModelError> {
        let begin = self.end;
        self.end += bytes.len() as u64;
        self.header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, self.end]}));
        self.file.write_all(bytes).map_err(ModelError::io(&self.data))
    }

    /// Bytes of the tensors so far.
    pub fn bytes(&self) -> u64 {
        self.end
    }

    /// Writes the file with its metadata.
    pub fn finish(mut self, metadata: BTreeMap<&str, String>) -> Result<(), ModelError> {
        let mut metadata: BTreeMap<&str, Value> =
            metadata.into_iter().map(|(key, value)| (key, json!(value))).collect();
        metadata.insert("format", json!("pt"));
        self.header.insert("__metadata__".into(), json!(metadata));
        let mut text = Value::Object(std::mem::take(&mut self.header)).to_string();
        // The data starts at a multiple of 8.
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let mut write = || -> std::io::Result<()> {
            self.file.flush()?;
            let mut file = BufWriter::new(File::create(&self.path)?);
            file.write_all(&(text.len() as u64).to_le_bytes())?;
            file.write_all(text.as_bytes())?;
            std::io::copy(&mut BufReader::new(File::open(&self.data)?), &mut file)?;
            file.flush()?;
            std::fs::remove_file(&self.data)
        };
        write().map_err(ModelError::io(&self.path))
    }
}
