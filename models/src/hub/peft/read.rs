//! Reading adapter folders.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::module::Module;

use super::brought::{self, Brought, Rows, is_copy};
use super::config;
use super::distribute::{Distributed, TensorNames};
use super::folder::{CONFIG, MODEL, Mark, OURS, WEIGHTS, adapter_dir, attached, digits};
use super::layout::Layout;
use super::names::{aliases, canonical, renamed};
use super::saved::is_of;
use crate::error::ModelError;
use crate::hub::TensorFiles;
use crate::hub::open::read_text;
use crate::llama::Llama;
use lowrank_adapters::{
    AdapterConfig, AdapterError, Attach, GivenTensors, NamePattern, Report, Size, Targets, TrainedBiases,
    base_fingerprint, linear_layers, shared_fingerprint,
};

/// An adapter folder whose configuration and header have been read; the tensors wait for [`PeftFolder::attach`].
#[derive(Debug)]
pub struct PeftFolder {
    pub(super) dir: PathBuf,
    /// Configuration of the adapter.
    pub config: AdapterConfig,
    /// The model that it was trained on, as the folder names it.
    pub base_model: Option<String>,
    /// Warnings about ignored settings, one line each.
    pub warnings: Vec<String>,
    pub(super) layout: Option<&'static Layout>,
    pub(super) mark: Mark,
    pub(super) files: TensorFiles,
    /// Embedding and head that share a table keep sharing it when one of them is trained whole.
    pub(super) keeps_tie: bool,
}

impl PeftFolder {
    /// Reads `adapter_config.json` and the header of `adapter_model.safetensors`. The adapter's name is "default".
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join(CONFIG);
        if !path.exists() {
            let reason = format!("has no {CONFIG}; name the folder of an adapter");
            return Err(ModelError::File { path: dir.to_path_buf(), reason });
        }
        let text = read_text(&path)?;
        let bad = |reason| ModelError::File { path: path.clone(), reason };
        let config::Read { config, layout, base_model, ranks, keeps_tie, warnings } =
            config::parse(&text).map_err(bad)?;
        let weights = dir.join(WEIGHTS);
        let pickled = dir.join("adapter_model.bin");
        if !weights.exists() && pickled.exists() {
            let reason = format!("is a pickle file, which may run code; let peft save it again as {WEIGHTS}");
            return Err(ModelError::File { path: pickled, reason });
        }
        let (mut files, mut metadata) = TensorFiles::of_file(&weights)?;
        files.rename(canonical)?;
        let ours = metadata.remove(OURS);
        let marked = ours.is_some();
        let mark: Mark = match ours {
            None => Mark::default(),
            Some(text) => serde_json::from_str(&text).map_err(|error| ModelError::File {
                path: weights.clone(),
                reason: format!("{OURS} in the header: {error}"),
            })?,
        };
        // Other configurations than that of LoRA have no key for it; folders of this program keep the tie.
        let keeps_tie =
            keeps_tie || marked && layout.is_some_and(|layout| layout.structure != Layout::lora().structure);
        let mut folder = Self { dir: dir.to_path_buf(), config, base_model, warnings, layout, mark, files, keeps_tie };
        if let Some(ours) = folder.mark.adapter.clone() {
            (folder.config.seed, folder.config.options) = (ours.seed, ours.options);
        }
        folder.folded_sizes(&ranks).map_err(|reason| ModelError::File { path: weights, reason })?;
        let biases = folder.config.bias != TrainedBiases::None;
        if biases && !folder.brings().iter().any(|name| name.ends_with(".bias")) {
            folder.warnings.push("bias asks for trained biases, and the file has none".into());
            folder.config.bias = TrainedBiases::None;
        }
        let layers = folder.layers();
        let file = |error: AdapterError| ModelError::File { path: path.clone(), reason: error.to_string() };
        drop_idle("rank_pattern", &mut folder.config.rank_pattern, &layers, &mut folder.warnings).map_err(file)?;
        drop_idle("alpha_pattern", &mut folder.config.alpha_pattern, &layers, &mut folder.warnings).map_err(file)?;
        let (targets, exclude) = (&folder.config.targets, &folder.config.exclude);
        // The tensors say which layers are adapted; an expression that is not supported is not needed.
        let foreign =
            [Some(targets), exclude.as_ref()].into_iter().flatten().any(|targets| targets.validate().is_err());
        // Of a layer that is named by its whole path peft does not ask for the block.
        let whole = |names: &[String]| names.iter().any(|name| layers.contains(name));
        let beside = folder.config.layers.is_some() && matches!(targets, Targets::Names(names) if whole(names));
        if foreign || beside {
            folder.config.targets = Targets::Names(layers.into_iter().collect());
            (folder.config.exclude, folder.config.layers) = (None, None);
        }
        let old = folder.layers();
        Ok(folder.in_module_names(&old).map_err(file)?.told_of_start())
    }

    /// Reads the folder of one of several adapters: `dir` itself for "default", the sub-folder of its name for others.
    pub fn open_named(dir: &Path, name: &str) -> Result<Self, ModelError> {
        Ok(Self::open(&adapter_dir(dir, name)?)?.named(name))
    }

    /// With another name, which distinguishes it from other adapters of the same model.
    pub fn named(mut self, name: &str) -> Self {
        self.config.name = name.to_string();
        self
    }

    /// Names and shapes of the tensors.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.files.shapes()
    }

    /// Rank and scale of each layer of a type that is read as another structure; `ranks` are those that its settings state.
    fn folded_sizes(&mut self, ranks: &BTreeMap<String, usize>) -> Result<(), String> {
        if self.layout.is_none_or(|layout| layout.folded.is_none()) {
            return Ok(());
        }
        let mut sizes = BTreeMap::new();
        let scale = self.config.alpha.unwrap_or(1.0) / self.config.rank.unwrap_or(1) as f64;
        let inner = self.files.shapes().filter_map(|(name, shape)| Some((name.strip_prefix(MODEL)?, shape)));
        for (layer, shape) in inner.filter_map(|(name, shape)| Some((self.layer_of(name)?, shape))) {
            let (path, rest) = layer;
            if let (Some("a"), Some(rank)) = (self.layout.and_then(|layout| layout.field(rest)), shape.first()) {
                if let Some(stated) = ranks.get(path).filter(|stated| *stated != rank) {
                    return Err(format!("{path} has {rank} rows; rank_pattern keeps {stated}"));
                }
                sizes.insert(path.to_string(), Size { rank: *rank, scale });
            }
        }
        self.mark.sizes = sizes;
        Ok(())
    }

    /// Names of weights that replace the model's own.
    pub fn brings(&self) -> Vec<&str> {
        let inner = self.files.shapes().filter_map(|(name, _)| name.strip_prefix(MODEL));
        inner.filter(|name| self.is_brought(name)).collect()
    }

    /// Names of trained weights that replace the model's own: without copies of weights that are adapted.
    pub fn trains(&self) -> Vec<&str> {
        self.brings().into_iter().filter(|name| !is_copy(name)).collect()
    }

    /// Number of tokens of the embedding that the folder brings whole, with the head if the file has one of that size.
    pub fn vocabulary(&self) -> Option<usize> {
        let rows = |wanted: &str| {
            let own = |(name, _): &(&str, &[usize])| name.strip_prefix(MODEL) == Some(wanted);
            self.files.shapes().find(own).and_then(|(_, shape)| shape.first().copied())
        };
        let embedding = rows("model.embed_tokens.weight")?;
        rows("lm_head.weight").is_none_or(|head| head == embedding).then_some(embedding)
    }

    /// Returns true if the adapter was trained on a head apart from the embedding: as an adapted layer, or because `peft` trained one of two that
    /// share a table as a copy of its own.
    pub fn has_own_head(&self) -> bool {
        let mut inner = self.files.shapes().filter_map(|(name, _)| name.strip_prefix(MODEL));
        let is_head = |name: &str| self.layer_of(name).is_some_and(|(layer, _)| layer == "lm_head");
        let whole = |name: &String| ["embed_tokens", "lm_head"].iter().any(|module| name.ends_with(module));
        inner.any(is_head) || !self.keeps_tie && self.config.modules_to_save.iter().any(whole)
    }

    pub(super) fn is_brought(&self, inner: &str) -> bool {
        let own = self.layout.is_some() || is_of(inner, &self.config.modules_to_save);
        own && brought::is_plain(inner) && self.layer_of(inner).is_none()
    }

    /// Paths of the layers that the tensors belong to.
    fn layers(&self) -> BTreeSet<String> {
        let inner = self.files.shapes().filter_map(|(name, _)| name.strip_prefix(MODEL));
        inner.filter_map(|name| self.layer_of(name)).map(|(layer, _)| layer.to_string()).collect()
    }

    /// Path of the layer and name of the field of a tensor, whose own name is `inner` behind the prefix.
    pub(super) fn layer_of<'a>(&self, inner: &'a str) -> Option<(&'a str, &'a str)> {
        let known = |rest: &str| {
            matches!(rest, "origin.a" | "origin.b")
                || match self.layout {
                    Some(layout) => layout.field(rest).is_some() || layout.shared_field(rest).is_some(),
                    None => self.config.entry().is_ok_and(|entry| entry.spec.tensor(rest).is_some()),
                }
        };
        let parts = inner.match_indices('.').map(|(dot, _)| (&inner[..dot], &inner[dot + 1..]));
        parts.into_iter().find(|(_, rest)| known(rest))
    }

    /// The module with the weights that the folder brings.
    fn with_brought<M: Module>(&mut self, module: M) -> Result<M, ModelError> {
        let names: Vec<(String, Vec<usize>)> =
            self.files.shapes().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect();
        let mut brought = Brought::default();
        for (name, shape) in names {
            let Some(inner) = name.strip_prefix(MODEL).filter(|inner| self.is_brought(inner)) else { continue };
            let values = self.files.take(&name, &shape)?;
            match brought::module_of_rows(inner) {
                Some(path) => {
                    let own = |module: &str| path == module || path.ends_with(&format!(".{module}"));
                    let rows =
                        self.config.token_rows.iter().find(|(module, _)| own(module)).map(|(_, rows)| rows.clone());
                    brought.rows.insert(path.to_string(), Rows { of: rows.unwrap_or_default(), shape, values });
                }
                None => drop(brought.whole.insert(inner.to_string(), (shape, values))),
            }
        }
        let path = self.dir.join(CONFIG);
        for saved in &self.config.modules_to_save {
            let of = |name: &String| name.split('.').any(|part| part == saved) || name.starts_with(saved.as_str());
            if !brought.whole.keys().any(of) {
                let reason = format!("modules_to_save names {saved}, of which {WEIGHTS} has no tensor");
                return Err(ModelError::File { path, reason });
            }
        }
        for (module, _) in &self.config.token_rows {
            if !brought.rows.keys().any(|path| path == module || path.ends_with(&format!(".{module}"))) {
                let reason = format!("trainable_token_indices names {module}, of which {WEIGHTS} has no rows");
                return Err(ModelError::File { path, reason });
            }
        }
        if brought.is_empty() {
            return Ok(module);
        }
        let (module, problems) = brought::put(module, brought);
        match problems.is_empty() {
            true => Ok(module),
            false => {
                let problems = problems.into_iter().map(|(name, problem)| (format!("{MODEL}{name}"), problem));
                Err(self.refused(problems.collect()))
            }
        }
    }

    /// Attaches the adapter to a model, in addition to existing ones. Everything but the adapter is frozen.
    ///
    /// Rejected: tensors that are missing, left over or of another shape, by name; another base than the adapter was trained on; a head that is the
    /// table of the embedding where [`PeftFolder::has_own_head`]: see [`Llama::with_own_head`].
    pub fn attach(self, model: Llama) -> Result<(Llama, Report), ModelError> {
        if model.lm_head.is_none() && self.has_own_head() {
            let reason = "was trained on a head apart from the embedding, and this model's is its table: give the model a head of its own, or merge the adapter into it and train on";
            return Err(ModelError::File { path: self.dir.join(CONFIG), reason: reason.into() });
        }
        let (before, after) = (model.config().vocab_size, self.vocabulary().unwrap_or(0));
        if after > before {
            let head = format!("{MODEL}lm_head.weight");
            if model.lm_head.is_some() && !self.files.shapes().any(|(name, _)| name == head) {
                let reason = format!(
                    "is missing: the embedding of the folder has {after} tokens, the head of the model {before}"
                );
                return Err(self.refused(vec![(head, reason)]));
            }
            let (model, mut report) = self.put(model.with_vocabulary(after), |attach, model| model.attach(attach))?;
            report.warnings.push(format!("the adapter brings {} tokens more than the model has", after - before));
            return Ok((model, report));
        }
        self.put(model, |attach, model| model.attach(attach))
    }

    /// As [`PeftFolder::attach`], for any Burn module whose paths are those of the folder.
    pub fn attach_to<M: Module>(self, module: M) -> Result<(M, Report), ModelError> {
        self.put(module, |attach, module| attach.to(module))
    }

    /// As [`PeftFolder::attach`], for a module with an own way of attaching.
    pub fn attach_by<M: Module>(
        self,
        module: M,
        attach: impl FnOnce(M, Attach) -> Result<(M, Report), AdapterError>,
    ) -> Result<(M, Report), ModelError> {
        self.put(module, |settings, module| attach(module, settings))
    }

    fn put<M: Module>(
        mut self,
        module: M,
        put: impl FnOnce(Attach, M) -> Result<(M, Report), AdapterError>,
    ) -> Result<(M, Report), ModelError> {
        let module = self.with_brought(module)?;
        let layers = linear_layers(&module)?;
        let aliases = aliases(&self.layers(), &layers);
        self.files.rename(|name| renamed(name, &aliases))?;
        self.mark.sizes = std::mem::take(&mut self.mark.sizes)
            .into_iter()
            .map(|(path, size)| (aliases.get(&path).cloned().unwrap_or(path), size))
            .collect();
        let with_origin = self.layout.is_none() || self.begins_as_part();
        let names = TensorNames { config: &self.config, layout: self.layout, with_origin };
        let Distributed { mut tensors, shared, mut problems } = names.distribute(&mut self.files, &layers)?;
        self.check_base(&module, tensors.keys().cloned().collect())?;
        if self.recomputes_start() {
            self.recompute_start(&module, &mut tensors)?;
        }
        if !shared.is_empty() {
            tensors.insert(lowrank_adapters::SHARED.to_string(), shared);
        }
        let attach = Attach::new(self.config.clone()).with_tensors(tensors).with_sizes(self.mark.sizes.clone());
        match put(attach, module) {
            Ok((module, report)) if problems.is_empty() => {
                self.check_shared(&module)?;
                Ok((module, report))
            }
            Ok(_) => Err(self.refused(problems)),
            Err(error) => match self.problems_of(error) {
                Ok(more) => {
                    problems.extend(more);
                    Err(self.refused(problems))
                }
                Err(error) => Err(error.into()),
            },
        }
    }

    fn check_base<M: Module>(&self, module: &M, layers: BTreeSet<String>) -> Result<(), ModelError> {
        let Some(trained_on) = &self.mark.base else { return Ok(()) };
        let here = digits(base_fingerprint(module, &layers));
        match *trained_on == here {
            true => Ok(()),
            false => Err(ModelError::File {
                path: self.dir.join(WEIGHTS),
                reason: format!(
                    "was trained on other base weights (number {trained_on}, those here have {here}); give the model that it was trained \
                     on{}",
                    self.base_model.as_ref().map_or(String::new(), |base| format!(", {base}"))
                ),
            }),
        }
    }

    fn check_shared<M: Module>(&self, module: &M) -> Result<(), ModelError> {
        let Some(written) = &self.mark.shared else { return Ok(()) };
        let here = shared_fingerprint(attached(module, &self.config.name).values()).map(digits);
        match here.as_ref() == Some(written) {
            true => Ok(()),
            false => Err(ModelError::File {
                path: self.dir.join(WEIGHTS),
                reason: format!(
                    "needs tensors that are recomputed from seed {}, and they have changed (number {written}, now {}): it was written by \
                     another version of this program",
                    self.config.seed,
                    here.as_deref().unwrap_or("none")
                ),
            }),
        }
    }

    pub(super) fn begins_as_part(&self) -> bool {
        self.config.initialisation().is_some_and(|init| init.starts_from_weight)
    }

    /// Returns true if the part of the base that the factors started from is not in the file.
    pub(super) fn recomputes_start(&self) -> bool {
        self.begins_as_part() && !self.files.shapes().any(|(name, _)| name.ends_with(".origin.a"))
    }

    fn told_of_start(mut self) -> Self {
        if self.recomputes_start() {
            self.warnings.push(format!(
                "the adapter started as part of the base weights ({}), and that part is not in the file: it is recomputed from the base; \
                 where peft computed it by approximation, the adapted weights differ a little",
                self.config.init
            ));
        }
        self
    }

    /// Gives each layer the product that a new adapter starts from.
    fn recompute_start<M: Module>(
        &self,
        module: &M,
        tensors: &mut BTreeMap<String, GivenTensors>,
    ) -> Result<(), ModelError> {
        let config = AdapterConfig { name: format!("start of {}", self.config.name), ..self.config.clone() };
        let name = config.name.clone();
        let (fresh, _) = Attach::new(AdapterConfig { dropout: 0.0, ..config }).to(module.clone())?;
        for (path, attached) in attached(&fresh, &name) {
            if let Some(layer) = tensors.get_mut(&path) {
                let start = attached.tensors().into_iter().filter(|(tensor, _)| tensor.field.starts_with("origin."));
                layer.extend(start.map(|(tensor, data)| (tensor.field, data)));
            }
        }
        Ok(())
    }

    /// Problems of tensors, under their names in the file; other errors unchanged.
    fn problems_of(&self, error: AdapterError) -> Result<Vec<(String, String)>, AdapterError> {
        match error {
            AdapterError::Several(errors) => {
                let all: Result<Vec<_>, _> = errors.into_iter().map(|error| self.problems_of(error)).collect();
                Ok(all?.concat())
            }
            AdapterError::Tensor { path, tensor, reason } => {
                let name = self.layout.and_then(|layout| layout.name(&tensor, false)).unwrap_or(&tensor);
                Ok(vec![(
                    if tensor == "all" { format!("{MODEL}{path}.*") } else { format!("{MODEL}{path}.{name}") },
                    reason,
                )])
            }
            other => Err(other),
        }
    }

    fn refused(&self, mut problems: Vec<(String, String)>) -> ModelError {
        const SHOWN: usize = 6;
        let path = self.dir.join(WEIGHTS);
        if problems.len() == 1 {
            let (tensor, reason) = problems.remove(0);
            return ModelError::Tensor { path, tensor, reason };
        }
        let count = problems.len();
        let shown = problems.into_iter().take(SHOWN).map(|(name, reason)| format!("\n  {name} {reason}"));
        let mut reason = format!("{count} tensors do not fit the adapter:{}", shown.collect::<String>());
        if count > SHOWN {
            reason.push_str(&format!("\n  and {} more", count - SHOWN));
        }
        ModelError::File { path, reason }
    }
}

/// Removes patterns that match no layer of the file, as `peft` ignores them.
fn drop_idle<T>(
    key: &str,
    patterns: &mut Vec<(String, T)>,
    layers: &BTreeSet<String>,
    warnings: &mut Vec<String>,
) -> Result<(), AdapterError> {
    let mut kept = Vec::new();
    for (text, value) in patterns.drain(..) {
        match NamePattern::new(&text, key)?.find(layers)? {
            Some(_) => kept.push((text, value)),
            None => warnings.push(format!("the pattern {text} matches no layer of the adapter and is ignored")),
        }
    }
    *patterns = kept;
    Ok(())
}
