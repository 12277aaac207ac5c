//! Models in a file: their configuration, their companions and their weights.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::DType;
use lowrank_kernels::narrow::ggml::Blocks;
use lowrank_kernels::narrow::packed::Codes;

use super::config;
use super::container::GgufFile;
use super::names::{Heads, in_halves, to_gguf};
use super::rope;
use super::tokenizer;
use super::types::{BlockType, TensorType};
use crate::error::ModelError;
use crate::hub::names::CONFIG;
use crate::hub::{FileType, HubConfig};
use crate::llama::LlamaConfig;
use crate::storage::{BaseStorage, MatrixStorage, StoredMatrix, transpose};
use crate::weights::{Choose, Init, Layout, WeightSource};

/// Reads the configuration of a model.
pub(in crate::hub) fn configuration(file: &GgufFile) -> Result<HubConfig, ModelError> {
    config::read(file)
}

/// Content of the files that a model folder would have, by name: configuration, tokenizer and chat templates.
pub(in crate::hub) fn files(file: &GgufFile) -> Result<BTreeMap<&'static str, String>, ModelError> {
    let mut files = tokenizer::files(file)?;
    files.insert(CONFIG, config::read(file)?.to_json(FileType::F32));
    Ok(files)
}

/// The tensors of a model, each read when it is asked for, in its blocks or dequantised, under Hugging Face's names and in its order of rows.
#[derive(Debug)]
pub(in crate::hub) struct GgufWeights<'a> {
    file: &'a GgufFile,
    heads: Heads,
    norms_after: bool,
    taken: BTreeSet<String>,
}

impl<'a> GgufWeights<'a> {
    pub fn new(file: &'a GgufFile, config: &LlamaConfig) -> Self {
        // The divisors are read with the configuration.
        let taken = BTreeSet::from([rope::DIVISORS.to_string()]);
        Self { file, heads: Heads::of(config), norms_after: config.features.norms_after, taken }
    }

    /// Name of a tensor in the file, which counts as used from now on.
    fn found(&mut self, path: &str, shape: &[usize]) -> Result<String, ModelError> {
        let Some(name) = to_gguf(path, self.norms_after) else {
            return Err(self.file.tensor_error(path, "has no name in GGUF".into()));
        };
        match self.file.shape(&name) {
            Some(found) if found == shape => {}
            Some(found) => {
                let reason = format!("has the shape {found:?}; the metadata asks for {shape:?}");
                return Err(self.file.tensor_error(&name, reason));
            }
            None => return Err(self.file.tensor_error(&name, "is missing".into())),
        }
        self.taken.insert(name.clone());
        Ok(name)
    }

    fn take(&mut self, path: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let name = self.found(path, shape)?;
        Ok(self.in_order(path, self.file.values(&name)?, shape[0]))
    }

    /// Rows in the order of Hugging Face: of values, or of bytes.
    fn in_order<T: Copy>(&self, path: &str, rows_of: Vec<T>, rows: usize) -> Vec<T> {
        match self.heads.reordered(path) {
            Some(heads) => in_halves(&rows_of, heads, rows),
            None => rows_of,
        }
    }

    /// Rejects tensors that were not used.
    pub fn finish(&self) -> Result<(), ModelError> {
        let left: Vec<&str> =
            self.file.tensors().map(|(name, ..)| name).filter(|name| !self.taken.contains(*name)).collect();
        match left.len() {
            0 => Ok(()),
            count => {
                let names = left[..count.min(3)].join(", ");
                Err(self.file.tensor_error(&names, format!("has no place in this model ({count} such)")))
            }
        }
    }
}

impl WeightSource for GgufWeights<'_> {
    fn matrix(&mut self, path: &str, shape: [usize; 2], layout: Layout, _: Init) -> Result<Vec<f32>, ModelError> {
        match layout {
            Layout::AsStored => self.take(path, &shape),
            Layout::Transposed => {
                let values = self.take(path, &[shape[1], shape[0]])?;
                Ok(transpose(&values, shape[1], shape[0]))
            }
        }
    }

    fn stored(
        &mut self,
        path: &str,
        shape: [usize; 2],
        layout: Layout,
        _: Init,
        storage: MatrixStorage,
    ) -> Result<StoredMatrix, ModelError> {
        let sides = if layout == Layout::Transposed { [shape[1], shape[0]] } else { shape };
        let name = self.found(path, &sides)?;
        let (kind, bytes) = self.file.bytes(&name)?;
        let stays = match (storage, kind) {
            (MatrixStorage::Frozen(BaseStorage::File), kind) => kind != TensorType::F32,
            (MatrixStorage::Frozen(BaseStorage::Bf16), kind) => kind == TensorType::BF16,
            (MatrixStorage::Frozen(BaseStorage::Q8_0), kind) => kind == TensorType::Blocks(BlockType::Q8_0),
            _ => false,
        };
        if !stays {
            let stored = storage.of_file(self.take(path, &sides)?, shape, layout);
            return stored.map_err(|reason| self.file.tensor_error(&name, reason));
        }
        let bytes = self.in_order(path, bytes.to_vec(), sides[0]);
        Ok(match kind {
            TensorType::Blocks(kind) => StoredMatrix::in_codes(Codes::Blocks(Blocks { kind, bytes }), shape, layout),
            TensorType::F16 => StoredMatrix::halves(bytes, DType::F16, sides, layout),
            TensorType::BF16 | TensorType::F32 => StoredMatrix::halves(bytes, DType::BF16, sides, layout),
        })
    }

    fn vector(&mut self, path: &str, len: usize, _: Init) -> Result<Vec<f32>, ModelError> {
        self.take(path, &[len])
    }

    fn positions(&mut self, path: &str, _: usize, _: usize, _: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        Err(self.file.tensor_error(path, "is missing: a GGUF model is dense".into()))
    }
}
