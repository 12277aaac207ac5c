//! Reading model folders.

use std::path::{Path, PathBuf};

use burn::tensor::Device;

use super::config::HubConfig;
use super::file_type::FileTypes;
use super::four_bit::{self, STATE};
use super::gguf::{GgufFile, GgufWeights, configuration};
use super::names::{CONFIG, EXACT};
use super::tensor_files::TensorFiles;
use crate::error::ModelError;
use crate::linear::Parameterization;
use crate::llama::{Llama, LlamaConfig};
use crate::storage::{MatrixStorage, StoredMatrix};
use crate::weights::{Choose, Init, Layout, RandomWeights, WeightSource};

/// A model folder whose configuration has been read.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    dir: PathBuf,
    /// Content of `config.json`.
    pub config: HubConfig,
    /// The model file, in place of a folder.
    pub(super) gguf: Option<GgufFile>,
}

impl ModelFolder {
    /// Reads the configuration; the weights wait for [`ModelFolder::load`]. A GGUF file may stand for a folder.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        if dir.is_file() {
            let file = GgufFile::open(dir)?;
            let config = configuration(&file)?;
            return Ok(Self { dir: dir.to_path_buf(), config, gguf: Some(file) });
        }
        if !dir.join(CONFIG).exists() {
            let reason = format!("has no {CONFIG}; name the folder of a model");
            return Err(ModelError::File { path: dir.to_path_buf(), reason });
        }
        let config = HubConfig::read(&dir.join(CONFIG))?;
        let holds_codes = || Ok::<_, ModelError>(TensorFiles::open(dir)?.names().any(|name| name.contains(STATE)));
        if four_bit::is_accounted(&dir.join(CONFIG))? && !holds_codes()? {
            return Err(four_bit::without_codes(&dir.join(CONFIG)));
        }
        Ok(Self { dir: dir.to_path_buf(), config, gguf: None })
    }

    /// Loads the model in f32. A tensor that is missing, left over or of another shape is rejected.
    pub fn load(&self, device: &Device) -> Result<Llama, ModelError> {
        self.load_stored(MatrixStorage::Wide, device)
    }

    /// As [`ModelFolder::load`], with matrices in a storage.
    pub fn load_stored(&self, storage: MatrixStorage, device: &Device) -> Result<Llama, ModelError> {
        let mut weights = self.weights()?;
        let model = Llama::build_stored(&self.config.llama, weights.source(), storage, device)?;
        weights.finish()?;
        Ok(model)
    }

    /// Loads a model that goes on being trained: its exact values, where they lie beside rounded ones.
    pub fn load_trained(&self, storage: MatrixStorage, device: &Device) -> Result<Llama, ModelError> {
        let exact = self.dir.join(EXACT);
        if !exact.exists() {
            return self.load_stored(storage, device);
        }
        let (mut files, _) = TensorFiles::of_file(&exact)?;
        let model = Llama::build_stored(&self.config.llama, &mut files, storage, device)?;
        files.finish()?;
        Ok(model)
    }

    /// Loads a dense model for a parameterization that starts from dense weights: its additional tensors are drawn from the seed. A
    /// missing weight is rejected, as are tensors that are left over.
    pub fn load_below(
        &self,
        parameterization: &Parameterization,
        seed: u64,
        device: &Device,
    ) -> Result<Llama, ModelError> {
        let dense = &self.config.llama;
        let mut source =
            Below { weights: self.weights()?, random: RandomWeights { seed, std: dense.initializer_range } };
        let config = LlamaConfig { parameterization: parameterization.clone(), ..dense.clone() };
        let model = Llama::build(&config, &mut source, device)?;
        source.weights.finish()?;
        Ok(model)
    }

    /// Headers of the files of a folder; none of a GGUF file.
    pub(super) fn headers(&self) -> Result<Option<TensorFiles>, ModelError> {
        if self.gguf.is_some() { Ok(None) } else { TensorFiles::open(&self.dir).map(Some) }
    }

    /// Types of the tensors in its files; f32 for a GGUF file, whose values may have types of blocks.
    pub fn types(&self) -> Result<FileTypes, ModelError> {
        match &self.gguf {
            Some(_) => Ok(FileTypes::default()),
            None => Ok(TensorFiles::open(&self.dir)?.types()),
        }
    }

    fn weights(&self) -> Result<Weights<'_>, ModelError> {
        match &self.gguf {
            Some(file) => Ok(Weights::Gguf(GgufWeights::new(file, &self.config.llama))),
            None => Ok(Weights::Files(self.files()?)),
        }
    }

    fn files(&self) -> Result<TensorFiles, ModelError> {
        let mut files = TensorFiles::open(&self.dir)?;
        if self.config.llama.tie_word_embeddings {
            files.drop_tied_copy("lm_head.weight", "model.embed_tokens.weight")?;
        }
        files.ignore(|name| name.ends_with(".rotary_emb.inv_freq"));
        Ok(files)
    }
}

/// The weights of a folder or of a GGUF file.
enum Weights<'a> {
    Files(TensorFiles),
    Gguf(GgufWeights<'a>),
}

impl Weights<'_> {
    fn source(&mut self) -> &mut dyn WeightSource {
        match self {
            Self::Files(files) => files,
            Self::Gguf(file) => file,
        }
    }

    /// Rejects tensors that were not used.
    fn finish(&self) -> Result<(), ModelError> {
        match self {
            Self::Files(files) => files.finish(),
            Self::Gguf(file) => file.finish(),
        }
    }
}

/// The weights of a dense model, and random tensors in addition.
struct Below<'a> {
    weights: Weights<'a>,
    random: RandomWeights,
}

impl Below<'_> {
    fn source(&mut self, path: &str) -> &mut dyn WeightSource {
        match path.ends_with(".weight") || path.ends_with(".bias") {
            true => self.weights.source(),
            false => &mut self.random,
        }
    }
}

impl WeightSource for Below<'_> {
    fn matrix(&mut self, path: &str, shape: [usize; 2], layout: Layout, init: Init) -> Result<Vec<f32>, ModelError> {
        self.source(path).matrix(path, shape, layout, init)
    }

    fn stored(
        &mut self,
        path: &str,
        shape: [usize; 2],
        layout: Layout,
        init: Init,
        storage: MatrixStorage,
    ) -> Result<StoredMatrix, ModelError> {
        self.source(path).stored(path, shape, layout, init, storage)
    }

    fn vector(&mut self, path: &str, len: usize, init: Init) -> Result<Vec<f32>, ModelError> {
        self.source(path).vector(path, len, init)
    }

    fn positions(
        &mut self,
        path: &str,
        count: usize,
        below: usize,
        chosen: Option<Choose>,
    ) -> Result<Vec<i32>, ModelError> {
        self.source(path).positions(path, count, below, chosen)
    }
}
