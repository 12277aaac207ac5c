//! Adapters and whole fine-tunes that are composed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lowrank_adapters::compose::{Layer, LayerSize, Matrix, Source, truncated};
use lowrank_adapters::{AdapterError, Targets};

use crate::error::ModelError;
use crate::hub::TensorFiles;
use crate::hub::peft::{FolderFactors, PeftFolder, PlainSettings};

/// One source of a composition.
#[derive(Debug)]
pub struct AdapterSource {
    /// Name in messages and pools.
    pub name: String,
    /// Weight; the method's own if none was given.
    pub weight: Option<f64>,
    /// Remarks about contents of the folder that are not used, one line each.
    pub warnings: Vec<String>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Adapter(Box<FolderFactors>),
    Tuned(Tuned),
}

/// A fine-tuned model and the base that it started from.
#[derive(Debug)]
struct Tuned {
    dir: PathBuf,
    base: TensorFiles,
    tuned: TensorFiles,
    rank: usize,
    /// `[d_in, d_out]` of the linear layers.
    layers: BTreeMap<String, [usize; 2]>,
}

/// Parts of the names of weights that are looked up instead of multiplied.
const LOOKED_UP: [&str; 5] = ["embed", "wte", "wpe", "shared", "relative_attention_bias"];

/// Paths and `[d_in, d_out]` of the linear layers of a list of tensors, as files name them: matrices `X.weight` that are no embedding.
pub fn linear_layers_of<'a>(shapes: impl Iterator<Item = (&'a str, &'a [usize])>) -> BTreeMap<String, [usize; 2]> {
    let linear = shapes.filter_map(|(name, shape)| match (name.strip_suffix(".weight"), shape) {
        (Some(path), [d_out, d_in]) if !LOOKED_UP.iter().any(|part| path.contains(part)) => {
            Some((path.to_string(), [*d_in, *d_out]))
        }
        _ => None,
    });
    linear.collect()
}

impl AdapterSource {
    /// An adapter folder.
    pub fn adapter(name: &str, dir: &Path, weight: Option<f64>) -> Result<Self, ModelError> {
        let folder = PeftFolder::open(dir)?;
        let warnings = folder.warnings.clone();
        Ok(Self { name: name.to_string(), weight, warnings, kind: Kind::Adapter(Box::new(folder.factors()?)) })
    }

    /// A whole fine-tune: the difference of the linear layers of `dir` from those of `base`, truncated to a rank.
    ///
    /// Other weights that differ are named in the warnings; they have no place in an adapter.
    pub fn tuned(name: &str, dir: &Path, base: &Path, rank: usize, weight: Option<f64>) -> Result<Self, ModelError> {
        let (mut base, mut tuned) = (TensorFiles::open(base)?, TensorFiles::open(dir)?);
        let shapes = |files: &TensorFiles| -> BTreeMap<String, Vec<usize>> {
            files.shapes().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect()
        };
        let (of_base, of_tuned) = (shapes(&base), shapes(&tuned));
        let problem = |tensor: &str, reason: String| {
            Err(ModelError::Tensor { path: dir.to_path_buf(), tensor: tensor.to_string(), reason })
        };
        for (tensor, shape) in &of_base {
            match of_tuned.get(tensor) {
                None => {
                    return problem(
                        tensor,
                        "is missing; the base has it: name the model that this one started from".into(),
                    );
                }
                Some(own) if own != shape => {
                    let reason = format!(
                        "has shape {own:?}, that of the base {shape:?}: name the model that this one started from"
                    );
                    return problem(tensor, reason);
                }
                Some(_) => {}
            }
        }
        if let Some(tensor) = of_tuned.keys().find(|tensor| !of_base.contains_key(*tensor)) {
            return problem(tensor, "is not in the base: name the model that this one started from".into());
        }
        let layers = linear_layers_of(of_base.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())));
        let heads = lowrank_adapters::AdapterConfig::new("lora");
        let known: Vec<lowrank_adapters::LinearLayer> = layers
            .iter()
            .map(|(path, shape)| lowrank_adapters::LinearLayer {
                path: path.clone(),
                shape: *shape,
                bias: false,
                embedding: false,
            })
            .collect();
        let chosen: BTreeSet<String> = heads.with_rank(1).places(&known)?.into_iter().map(|place| place.path).collect();
        let layers: BTreeMap<_, _> = layers.into_iter().filter(|(path, _)| chosen.contains(path)).collect();
        let mut warnings = Vec::new();
        for (tensor, shape) in &of_base {
            let linear = tensor.strip_suffix(".weight").is_some_and(|path| layers.contains_key(path));
            if !linear && base.take(tensor, shape)? != tuned.take(tensor, shape)? {
                warnings.push(format!(
                    "{tensor} differs from the base, and no adapter of linear layers holds it: it is left out"
                ));
            }
        }
        let kind = Kind::Tuned(Tuned { dir: dir.to_path_buf(), base, tuned, rank, layers });
        Ok(Self { name: name.to_string(), weight, warnings, kind })
    }

    /// Paths and `[d_in, d_out]` of its layers that have not been read.
    fn layers(&self) -> BTreeMap<String, [usize; 2]> {
        match &self.kind {
            Kind::Adapter(factors) => factors.layers().map(|place| (place.path.clone(), place.shape)).collect(),
            Kind::Tuned(tuned) => tuned.layers.clone(),
        }
    }

    fn embeddings(&self) -> BTreeSet<String> {
        match &self.kind {
            Kind::Adapter(factors) => factors.embeddings(),
            Kind::Tuned(_) => BTreeSet::new(),
        }
    }

    fn rank(&self, path: &str) -> usize {
        match &self.kind {
            Kind::Adapter(factors) => factors.rank(path).unwrap_or(0),
            Kind::Tuned(tuned) => tuned.layers.get(path).map_or(0, |[d_in, d_out]| tuned.rank.min(*d_in).min(*d_out)),
        }
    }

    fn take(&mut self, path: &str) -> Result<Option<Source>, ModelError> {
        match &mut self.kind {
            Kind::Adapter(factors) => Ok(factors
                .layer(path)?
                .map(|layer| Source { basis: layer.basis, ..Source::of(&self.name, layer.factors, self.weight) })),
            Kind::Tuned(tuned) => match tuned.layers.remove(path) {
                None => Ok(None),
                Some([d_in, d_out]) => {
                    let name = format!("{path}.weight");
                    let (base, own) =
                        (tuned.base.take(&name, &[d_out, d_in])?, tuned.tuned.take(&name, &[d_out, d_in])?);
                    let apart: Vec<f64> =
                        own.iter().zip(&base).map(|(own, base)| f64::from(*own) - f64::from(*base)).collect();
                    if let Some(value) = apart.iter().find(|value| !value.is_finite()) {
                        let reason = format!("differs from the base by {value}; one of the two is damaged");
                        return Err(ModelError::Tensor { path: tuned.dir.clone(), tensor: name, reason });
                    }
                    let (a, b, _) = truncated(Matrix::from_row_slice(d_out, d_in, &apart), tuned.rank);
                    Ok(Some(Source { adapter: self.name.clone(), a, b, scale: 1.0, weight: self.weight, basis: None }))
                }
            },
        }
    }
}

/// The sources of a composition, in order.
#[derive(Debug)]
pub struct Sources {
    sources: Vec<AdapterSource>,
    /// Layers and sides.
    layers: BTreeMap<String, [usize; 2]>,
    missing: BTreeSet<String>,
    /// Layers that are embeddings.
    embeddings: BTreeSet<String>,
}

impl Sources {
    /// Sources with their layers. Rejects names given twice, adapters of other base weights, and layers that some do not have, unless these count as
    /// unchanged there (`allow_missing`).
    pub fn new(sources: Vec<AdapterSource>, allow_missing: bool) -> Result<Self, ModelError> {
        let refused = |reason: String| Err(AdapterError::Refused(reason).into());
        for (place, source) in sources.iter().enumerate() {
            if sources[..place].iter().any(|other| other.name == source.name) {
                return refused(format!(
                    "two adapters have the name {}; give each one once, or names of their own",
                    source.name
                ));
            }
        }
        let (mut layers, mut missing) = (BTreeMap::new(), BTreeSet::new());
        for source in &sources {
            layers.extend(source.layers());
        }
        for source in &sources {
            let own = source.layers();
            let lacks: Vec<&String> = layers.keys().filter(|path| !own.contains_key(*path)).collect();
            let Some(first) = lacks.first() else { continue };
            if !allow_missing {
                let has = sources.iter().find(|other| other.layers().contains_key(*first));
                return refused(format!(
                    "adapter {} has no layer {first}, which {} adapts ({} such layers of {}); compose adapters with the same targets, or let missing \
                     layers count as unchanged (--allow-missing)",
                    source.name,
                    has.map_or("another", |other| other.name.as_str()),
                    lacks.len(),
                    layers.len()
                ));
            }
            missing.extend(lacks.into_iter().cloned());
        }
        let mut embeddings = BTreeSet::new();
        for source in &sources {
            embeddings.extend(source.embeddings());
        }
        for source in &sources {
            let (own, known) = (source.layers(), source.embeddings());
            if let Some(path) = embeddings.iter().find(|path| own.contains_key(*path) && !known.contains(*path)) {
                return refused(format!(
                    "{path} is an embedding in one adapter and a linear layer in {}; compose adapters of one model",
                    source.name
                ));
            }
        }
        let all = Self { sources, layers, missing, embeddings };
        all.check_base()?;
        Ok(all)
    }

    /// Names in order.
    pub fn names(&self) -> Vec<String> {
        self.sources.iter().map(|source| source.name.clone()).collect()
    }

    /// Remarks about contents that are not used.
    pub fn warnings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.sources
            .iter()
            .flat_map(|source| source.warnings.iter().map(|warning| (source.name.as_str(), warning.as_str())))
    }

    /// Paths and sides of the layers.
    pub fn layers(&self) -> &BTreeMap<String, [usize; 2]> {
        &self.layers
    }

    /// Sizes of the layers, in the order of their paths.
    pub fn sizes(&self) -> Vec<LayerSize> {
        let size = |(path, shape): (&String, &[usize; 2])| LayerSize {
            shape: *shape,
            ranks: self.sources.iter().map(|source| source.rank(path)).collect(),
        };
        self.layers.iter().map(size).collect()
    }

    /// The sources' updates of a layer.
    pub fn take(&mut self, path: &str, shape: [usize; 2]) -> Result<Layer, ModelError> {
        let mut found = Vec::with_capacity(self.sources.len());
        for source in &mut self.sources {
            found.push(match source.take(path)? {
                Some(own) => own,
                None => Source::empty(&source.name, shape, source.weight),
            });
        }
        Ok(Layer::new(path, found)?)
    }

    fn adapters(&self) -> impl Iterator<Item = (&AdapterSource, &FolderFactors)> {
        self.sources.iter().filter_map(|source| match &source.kind {
            Kind::Adapter(factors) => Some((source, factors.as_ref())),
            Kind::Tuned(_) => None,
        })
    }

    /// Rejects adapters of the same layers that were trained on different base weights.
    fn check_base(&self) -> Result<(), ModelError> {
        if !self.missing.is_empty() {
            // The fingerprint is that of the adapted layers.
            return Ok(());
        }
        let mut known = self.adapters().filter_map(|(source, factors)| Some((source, factors.base.as_ref()?)));
        let Some((first, base)) = known.next() else { return Ok(()) };
        match known.find(|(_, other)| *other != base) {
            None => Ok(()),
            Some((other, own)) => Err(AdapterError::Refused(format!(
                "adapter {} was trained on other base weights (number {own}) than {} ({base}); compose adapters of one model",
                other.name, first.name
            ))
            .into()),
        }
    }

    /// Settings that the sources have in common, for the folder of the result.
    pub fn settings(&self) -> PlainSettings {
        let configs: Vec<_> = self.adapters().map(|(_, factors)| &factors.config).collect();
        let plain = |config: &&lowrank_adapters::AdapterConfig| config.exclude.is_none() && config.layers.is_none();
        let same = configs.len() == self.sources.len()
            && self.missing.is_empty()
            && configs.iter().all(plain)
            && configs.windows(2).all(|pair| pair[0].targets == pair[1].targets);
        let targets = configs.first().filter(|_| same).map(|config| config.targets.clone());
        // A regular expression or `all-linear` may match more layers elsewhere.
        let targets = targets.filter(|targets| matches!(targets, Targets::Names(_)));
        let common = |of: &dyn Fn(&FolderFactors) -> Option<String>| {
            let mut all = self.adapters().map(|(_, factors)| of(factors));
            let first = all.next().flatten()?;
            all.all(|other| other.as_ref() == Some(&first)).then_some(first)
        };
        PlainSettings {
            targets,
            base_model: common(&|factors| factors.base_model.clone()),
            base: common(&|factors| factors.base.clone()).filter(|_| self.missing.is_empty()),
            embeddings: self.embeddings.clone(),
        }
    }
}
