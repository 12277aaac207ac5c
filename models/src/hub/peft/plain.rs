//! Writing of plain LoRA folders layer by layer, without a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::brought::is_copy;
use super::config::Written;
use super::folder::{CONFIG, MODEL, Mark, OURS, WEIGHTS};
use super::layout::Layout;
use super::read::PeftFolder;
use crate::error::ModelError;
use crate::hub::spool::TensorSpool;
use crate::weights::host;
use lowrank_adapters::{AdapterConfig, AdapterError, Factors, Scaling, Targets, TrainedBiases};

/// A folder of a plain LoRA in the making, as `peft` reads it.
pub struct PlainLora {
    dir: PathBuf,
    spool: TensorSpool,
    /// Rank and alpha by layer.
    sizes: BTreeMap<String, (usize, f64)>,
    empty: Vec<String>,
    embeddings: BTreeSet<String>,
    besides: Option<Besides>,
}

/// Settings of a folder of a plain LoRA.
#[derive(Clone, Debug, Default)]
pub struct PlainSettings {
    /// Layers to adapt, if they are exactly those that are written; their paths otherwise.
    pub targets: Option<Targets>,
    /// The model that it belongs to.
    pub base_model: Option<String>,
    /// Fingerprint of the base weights.
    pub base: Option<String>,
    /// Paths of the layers that are embeddings.
    pub embeddings: BTreeSet<String>,
}

/// Weights of a folder that belong to no layer of its adapter: modules trained whole, biases and rows of tables.
#[derive(Clone, Debug)]
pub struct Besides {
    pub(super) modules_to_save: Vec<String>,
    pub(super) token_rows: Vec<(String, Vec<usize>)>,
    pub(super) bias: TrainedBiases,
    pub(super) keeps_tie: bool,
    /// Shapes and values by their names in the file.
    pub(super) tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl PeftFolder {
    /// What the folder holds besides its adapter, to be written with another form of it. Copies of base weights are left out.
    pub fn besides(&mut self) -> Result<Besides, ModelError> {
        let names: Vec<(String, Vec<usize>)> = self
            .files
            .shapes()
            .filter(|(name, _)| name.strip_prefix(MODEL).is_some_and(|inner| self.is_brought(inner)))
            .filter(|(name, _)| !is_copy(name))
            .map(|(name, shape)| (name.to_string(), shape.to_vec()))
            .collect();
        let mut tensors = BTreeMap::new();
        for (name, shape) in names {
            let values = self.files.take(&name, &shape)?;
            tensors.insert(name, (shape, values));
        }
        let AdapterConfig { modules_to_save, token_rows, bias, .. } = self.config.clone();
        let bias = if tensors.keys().any(|name| name.ends_with(".bias")) { bias } else { TrainedBiases::None };
        Ok(Besides { modules_to_save, token_rows, bias, keeps_tie: self.keeps_tie, tensors })
    }
}

impl PlainLora {
    /// Starts a folder, which exists and is empty: use a new one and rename it at the end.
    pub fn create(dir: &Path) -> Result<Self, ModelError> {
        let spool = TensorSpool::create(&dir.join(WEIGHTS))?;
        Ok(Self {
            dir: dir.to_path_buf(),
            spool,
            sizes: BTreeMap::new(),
            empty: Vec::new(),
            embeddings: BTreeSet::new(),
            besides: None,
        })
    }

    /// Layers with these paths are embeddings, whose factors have names of their own.
    pub fn with_embeddings(self, embeddings: BTreeSet<String>) -> Self {
        Self { embeddings, ..self }
    }

    /// Appends what another folder holds besides its adapter.
    pub fn push_besides(&mut self, besides: Besides) -> Result<(), ModelError> {
        for (name, (shape, values)) in &besides.tensors {
            self.spool.push(name, shape, values)?;
        }
        self.besides = Some(Besides { tensors: BTreeMap::new(), ..besides });
        Ok(())
    }

    /// Appends the update of a layer. One of rank 0 is left out, as `peft` has no rank 0.
    pub fn push(&mut self, path: &str, factors: &Factors) -> Result<(), ModelError> {
        let ([d_in, rank], [_, d_out]) = (factors.a.dims(), factors.b.dims());
        if rank == 0 {
            self.empty.push(path.to_string());
            return Ok(());
        }
        let embedding = self.embeddings.contains(path);
        let values = [(&factors.a, "a", [rank, d_in], "A"), (&factors.b, "b", [d_out, rank], "B")];
        for (tensor, field, shape, letter) in values {
            let Some(name) = Layout::lora().name(field, embedding) else { unreachable!("LoRA has both factors") };
            let values = host(tensor.clone().without_autodiff().transpose());
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                let reason =
                    format!("{path}: {letter} would hold {value}; the sources are too large to be combined in f32");
                return Err(AdapterError::Refused(reason).into());
            }
            self.spool.push(&format!("{MODEL}{path}.{name}"), &shape, &values)?;
        }
        self.sizes.insert(path.to_string(), (rank, factors.scale * rank as f64));
        Ok(())
    }

    /// Bytes of the factors so far.
    pub fn bytes(&self) -> u64 {
        self.spool.bytes()
    }

    /// Layers that were left out because their update has rank 0.
    pub fn left_out(&self) -> &[String] {
        &self.empty
    }

    /// Writes the configuration and the tensors.
    pub fn finish(self, settings: PlainSettings) -> Result<(), ModelError> {
        let sizes: Vec<(&String, &(usize, f64))> = self.sizes.iter().collect();
        let Some((_, (rank, alpha))) = sizes.first().copied().map(|(path, size)| (path, *size)) else {
            return Err(AdapterError::Refused("every layer has rank 0: there is no adapter to write".into()).into());
        };
        let others = |differs: &dyn Fn(&(usize, f64)) -> bool| -> BTreeSet<String> {
            sizes.iter().filter(|(_, size)| differs(size)).map(|(path, _)| (*path).clone()).collect()
        };
        let rank_pattern =
            others(&|size| size.0 != rank).into_iter().map(|path| (regex::escape(&path), self.sizes[&path].0));
        // peft's alpha of a layer does not follow its rank.
        let alpha_pattern =
            others(&|size| size.1 != alpha).into_iter().map(|path| (regex::escape(&path), self.sizes[&path].1));
        let paths: Vec<&str> = self.sizes.keys().map(String::as_str).collect();
        let whole = settings.targets.filter(|_| self.empty.is_empty());
        let besides = self.besides.as_ref();
        let ties = besides.is_some_and(|besides| besides.keeps_tie && !besides.modules_to_save.is_empty());
        let config = AdapterConfig {
            modules_to_save: besides.map(|besides| besides.modules_to_save.clone()).unwrap_or_default(),
            token_rows: besides.map(|besides| besides.token_rows.clone()).unwrap_or_default(),
            bias: besides.map_or(TrainedBiases::None, |besides| besides.bias),
            rank: Some(rank),
            alpha: Some(alpha),
            scaling: Some(Scaling::Rank),
            rank_pattern: rank_pattern.collect(),
            alpha_pattern: alpha_pattern.collect(),
            targets: whole.unwrap_or_else(|| Targets::Names(paths.iter().map(|path| path.to_string()).collect())),
            ..AdapterConfig::new("lora")
        };
        let layout = Layout::lora();
        let keys = (layout.write)(&config).map_err(AdapterError::Refused)?;
        let base_model = settings.base_model.as_deref();
        let text = Written { config: &config, layout: Some((layout, keys)), paths, base_model, ties }.text();
        let mark = Mark { base: settings.base, ..Mark::default() };
        let Ok(mark) = serde_json::to_string(&mark) else { unreachable!("texts are JSON") };
        self.spool.finish(BTreeMap::from([(OURS, mark)]))?;
        let path = self.dir.join(CONFIG);
        std::fs::write(&path, text).map_err(ModelError::io(path))
    }
}
