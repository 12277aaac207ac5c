//! Pools: folders that hold several adapters in less room and give each one back (`pool.json` and `pool.safetensors`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lowrank_adapters::Targets;
use lowrank_adapters::compose::{Matrix, PoolLayer, Side};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::ModelError;
use crate::hub::TensorFiles;
use crate::hub::open::{open, read_text};
use crate::hub::peft::PlainSettings;
use crate::hub::spool::TensorSpool;

/// Name of the description.
const MANIFEST: &str = "pool.json";
/// Name of the tensors.
const TENSORS: &str = "pool.safetensors";

/// Description of a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    method: String,
    names: Vec<String>,
    base_model: Option<String>,
    base: Option<String>,
    targets: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    embeddings: BTreeSet<String>,
    layers: BTreeMap<String, LayerEntry>,
    /// SHA-256 of the tensors.
    sha256: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct LayerEntry {
    shape: [usize; 2],
    rank: usize,
    p: usize,
    scales: Vec<f64>,
}

/// Settings of a pool that its tensors do not hold.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    /// Method that made it.
    pub method: String,
    /// Names of the adapters, in order.
    pub names: Vec<String>,
    /// Properties that the adapters have in common.
    pub plain: PlainSettings,
}

/// A pool in the making.
pub struct PoolWriter {
    dir: PathBuf,
    spool: TensorSpool,
    layers: BTreeMap<String, LayerEntry>,
}

impl PoolWriter {
    /// Starts a pool in a folder that exists and is empty: use a new one and rename it at the end.
    pub fn create(dir: &Path) -> Result<Self, ModelError> {
        Ok(Self { dir: dir.to_path_buf(), spool: TensorSpool::create(&dir.join(TENSORS))?, layers: BTreeMap::new() })
    }

    /// Appends a layer.
    pub fn push(&mut self, path: &str, layer: &PoolLayer) -> Result<(), ModelError> {
        let (rank, p, count) = (layer.a.mean.nrows(), layer.directions(), layer.sources());
        let [d_in, d_out] = [layer.a.mean.ncols(), layer.b.mean.ncols()];
        for (side, letter, positions) in [(&layer.b, "B", d_out), (&layer.a, "A", d_in)] {
            let mean = &side.mean;
            // Column-major `[r, positions]` is row-major `[positions, r]`.
            let (mean, shape) = match letter {
                "B" => (mean.iter().map(|value| *value as f32).collect::<Vec<_>>(), [positions, rank]),
                _ => (mean.transpose().iter().map(|value| *value as f32).collect(), [rank, positions]),
            };
            self.spool.push(&format!("{path}.mean_{letter}"), &shape, &mean)?;
            if p > 0 {
                let basis = swapped(side.basis.as_slice(), positions, p, rank);
                self.spool.push(&format!("{path}.basis_{letter}"), &[positions, rank, p], &basis)?;
                let coefficients = swapped(side.coefficients.as_slice(), positions, count, p);
                self.spool.push(&format!("{path}.coef_{letter}"), &[positions, p, count], &coefficients)?;
            }
        }
        let entry = LayerEntry { shape: [d_in, d_out], rank, p, scales: layer.scales.clone() };
        self.layers.insert(path.to_string(), entry);
        Ok(())
    }

    /// Bytes of the tensors so far.
    pub fn bytes(&self) -> u64 {
        self.spool.bytes()
    }

    /// Writes the tensors and the description.
    pub fn finish(self, settings: PoolSettings) -> Result<(), ModelError> {
        self.spool.finish(BTreeMap::new())?;
        let PoolSettings { method, names, plain } = settings;
        let targets = match plain.targets {
            Some(Targets::Names(names)) => Some(names),
            _ => None,
        };
        let sha256 = hash(&self.dir.join(TENSORS))?;
        let manifest = Manifest {
            format: 1,
            method,
            names,
            base_model: plain.base_model,
            base: plain.base,
            targets,
            embeddings: plain.embeddings,
            layers: self.layers,
            sha256,
        };
        let Ok(text) = serde_json::to_string_pretty(&manifest) else {
            unreachable!("texts and finite numbers are JSON")
        };
        let path = self.dir.join(MANIFEST);
        std::fs::write(&path, text + "\n").map_err(ModelError::io(path))
    }
}

/// Values of `[outer, rows, columns]` as f32 in the order `[outer, columns, rows]`.
fn swapped(values: &[f64], outer: usize, rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for part in 0..outer {
        for column in 0..columns {
            out.extend((0..rows).map(|row| values[(part * rows + row) * columns + column] as f32));
        }
    }
    out
}

fn hash(path: &Path) -> Result<String, ModelError> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut open(path)?, &mut hasher).map_err(ModelError::io(path))?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A pool whose description has been read and whose tensors have the hash that it states.
#[derive(Debug)]
pub struct PoolFolder {
    path: PathBuf,
    manifest: Manifest,
    files: TensorFiles,
}

impl PoolFolder {
    /// Returns true if a folder looks like a pool.
    pub fn is_pool(dir: &Path) -> bool {
        dir.join(MANIFEST).exists()
    }

    /// Opens a pool. Rejects tensors whose hash does not match.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join(MANIFEST);
        if !path.exists() {
            let reason = format!("has no {MANIFEST}; name a folder that `lowrank compose --method rmm` wrote");
            return Err(ModelError::File { path: dir.to_path_buf(), reason });
        }
        let bad = |reason: String| ModelError::File { path: path.clone(), reason };
        let manifest: Manifest = serde_json::from_str(&read_text(&path)?)
            .map_err(|error| bad(format!("is no description of a pool: {error}")))?;
        if manifest.format != 1 {
            return Err(bad(format!("has format {}; this version of the program reads format 1", manifest.format)));
        }
        let counts = manifest.layers.iter().find(|(_, layer)| layer.scales.len() != manifest.names.len());
        if let Some((layer, entry)) = counts {
            let (scales, names) = (entry.scales.len(), manifest.names.len());
            return Err(bad(format!("has {scales} scales of {layer} and {names} names: damaged, fetch it again")));
        }
        let tensors = dir.join(TENSORS);
        let here = hash(&tensors)?;
        if here != manifest.sha256 {
            return Err(ModelError::File {
                path: tensors,
                reason: format!(
                    "has the hash {here}, {MANIFEST} says {}: damaged or of another pool, fetch or compose it again",
                    manifest.sha256
                ),
            });
        }
        let (files, _) = TensorFiles::of_file(&tensors)?;
        Ok(Self { path: tensors, manifest, files })
    }

    /// Names of the adapters, in order.
    pub fn names(&self) -> &[String] {
        &self.manifest.names
    }

    /// Settings for another pool or for an adapter of it.
    pub fn settings(&self) -> PoolSettings {
        let Manifest { method, names, base_model, base, targets, embeddings, .. } = self.manifest.clone();
        let plain = PlainSettings { targets: targets.map(Targets::Names), base_model, base, embeddings };
        PoolSettings { method, names, plain }
    }

    /// Paths, `[d_in, d_out]`, rank and directions of the layers.
    pub fn layers(&self) -> impl Iterator<Item = (&str, [usize; 2], usize, usize)> {
        self.manifest.layers.iter().map(|(path, layer)| (path.as_str(), layer.shape, layer.rank, layer.p))
    }

    /// Bytes of the tensors.
    pub fn bytes(&self) -> u64 {
        self.files.shapes().map(|(_, shape)| 4 * shape.iter().product::<usize>() as u64).sum()
    }

    /// Number of an adapter. Rejects an unknown name.
    pub fn number(&self, name: &str) -> Result<usize, ModelError> {
        let names = self.names();
        names.iter().position(|known| known == name).ok_or_else(|| {
            let reason = format!("holds no adapter \"{name}\"; it holds {}", names.join(", "));
            ModelError::File { path: self.path.clone(), reason }
        })
    }

    /// Reads a layer.
    pub fn take(&mut self, path: &str) -> Result<PoolLayer, ModelError> {
        let Some(entry) = self.manifest.layers.get(path).cloned() else {
            let reason = format!("has no layer {path}");
            return Err(ModelError::File { path: self.path.clone(), reason });
        };
        let LayerEntry { shape: [d_in, d_out], rank, p, scales } = entry;
        let count = scales.len();
        let mut side = |letter: &str, positions: usize| -> Result<Side, ModelError> {
            let mut read = |what: &str, shape: &[usize]| self.files.take(&format!("{path}.{what}_{letter}"), shape);
            let mean = match letter {
                "B" => {
                    Matrix::from_iterator(rank, positions, read("mean", &[positions, rank])?.into_iter().map(f64::from))
                }
                _ => {
                    let values = read("mean", &[rank, positions])?;
                    Matrix::from_row_iterator(rank, positions, values.into_iter().map(f64::from))
                }
            };
            let (basis, coefficients) = match p {
                0 => (Vec::new(), Vec::new()),
                _ => (read("basis", &[positions, rank, p])?, read("coef", &[positions, p, count])?),
            };
            let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
            let back = |values: Vec<f32>, rows: usize, columns: usize| {
                let values = swapped(&wide(values), positions, rows, columns);
                Matrix::from_iterator(rows * columns, positions, values.into_iter().map(f64::from))
            };
            Ok(Side {
                mean,
                basis: back(basis, if p == 0 { 0 } else { rank }, p),
                coefficients: back(coefficients, p, if p == 0 { 0 } else { count }),
                values: Vec::new(),
            })
        };
        let (b, a) = (side("B", d_out)?, side("A", d_in)?);
        Ok(PoolLayer { b, a, scales })
    }
}
