//! Writing of plain LoRA folders layer by layer, without a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::config::Written;
use super::folder::{CONFIG, MODEL, Mark, OURS, WEIGHTS};
use super::layout::Layout;
use crate::error::ModelError;
use crate::hub::spool::TensorSpool;
use crate::weights::host;
use lowrank_adapters::{AdapterConfig, AdapterError, Factors, Scaling, Targets};

/// A folder of a plain LoRA in the making, as `peft` reads it.
pub struct PlainLora {
    dir: PathBuf,
    spool: TensorSpool,
    /// Rank and alpha by layer.
    sizes: BTreeMap<String, (usize, f64)>,
    empty: Vec<String>,
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
}

impl PlainLora {
    /// Starts a folder, which exists and is empty: use a new one and rename it at the end.
    pub fn create(dir: &Path) -> Result<Self, ModelError> {
        let spool = TensorSpool::create(&dir.join(WEIGHTS))?;
        Ok(Self { dir: dir.to_path_buf(), spool, sizes: BTreeMap::new(), empty: Vec::new() })
    }

    /// Appends the update of a layer. One of rank 0 is left out, as `peft` has no rank 0.
    pub fn push(&mut self, path: &str, factors: &Factors) -> Result<(), ModelError> {
        let ([d_in, rank], [_, d_out]) = (factors.a.dims(), factors.b.dims());
        if rank == 0 {
            self.empty.push(path.to_string());
            return Ok(());
        }
        let values =
            [(&factors.a, "lora_A.weight", [rank, d_in], "A"), (&factors.b, "lora_B.weight", [d_out, rank], "B")];
        for (tensor, name, shape, letter) in values {
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
        let config = AdapterConfig {
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
        let text = Written { config: &config, layout: Some((layout, keys)), paths, base_model }.text();
        let mark = Mark { base: settings.base, ..Mark::default() };
        let Ok(mark) = serde_json::to_string(&mark) else { unreachable!("texts are JSON") };
        self.spool.finish(BTreeMap::from([(OURS, mark)]))?;
        let path = self.dir.join(CONFIG);
        std::fs::write(&path, text).map_err(ModelError::io(path))
    }
}
