//! Models in a file: their configuration, their companions and their weights.

use std::collections::{BTreeMap, BTreeSet};

use super::config;
use super::container::GgufFile;
use super::names::{Heads, in_halves, to_gguf};
use super::rope;
use super::tokenizer;
use crate::error::ModelError;
use crate::hub::names::CONFIG;
use crate::hub::{FileType, HubConfig};
use crate::llama::LlamaConfig;
use crate::storage::transpose;
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

/// The tensors of a model, each dequantised when it is asked for, under Hugging Face's names and in its order of rows.
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

    fn take(&mut self, path: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
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
        let values = self.file.values(&name)?;
        self.taken.insert(name);
        Ok(match self.heads.reordered(path) {
            Some(heads) => in_halves(&values, heads, shape[0]),
            None => values,
        })
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

    fn vector(&mut self, path: &str, len: usize, _: Init) -> Result<Vec<f32>, ModelError> {
        self.take(path, &[len])
    }

    fn positions(&mut self, path: &str, _: usize, _: usize, _: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        Err(self.file.tensor_error(path, "is missing: a GGUF model is dense".into()))
    }
}
