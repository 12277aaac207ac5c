//! Adapter folders as data: the factors of every layer, without a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use burn::tensor::TensorData;

use super::brought::is_copy;
use super::folder::{MODEL, WEIGHTS, digits};
use super::layout::Layout;
use super::read::PeftFolder;
use crate::error::ModelError;
use crate::hub::TensorFiles;
use lowrank_adapters::{
    AdapterConfig, AdapterError, GivenTensors, LayerFactors, LinearLayer, Place, SharedTensors, TensorRole, factors_of,
    fingerprint_of_shared,
};

/// Tensors of the layers: their fields, and the names they have in the file.
type Names = BTreeMap<String, BTreeMap<String, String>>;

/// The layers of an adapter folder, one after the other or by path: only one layer's tensors are in memory. See [`PeftFolder::factors`].
#[derive(Debug)]
pub struct FolderFactors {
    /// Configuration of the adapter.
    pub config: AdapterConfig,
    /// The model that it was trained on, as the folder names it.
    pub base_model: Option<String>,
    /// Fingerprint of the base weights that it was trained on, if the folder has one.
    pub base: Option<String>,
    path: PathBuf,
    files: TensorFiles,
    names: Names,
    /// Layers that have not been read.
    places: BTreeMap<String, Place>,
    shared: SharedTensors,
    /// Fingerprint of the tensors that are recomputed from the seed.
    recomputed: Option<String>,
    layout: Option<&'static Layout>,
}

impl PeftFolder {
    /// The update of every layer as two factors and a scale. No model is needed.
    ///
    /// Rejected, with an alternative: adapters whose update is not a product of factors, or depends on the base weights.
    pub fn factors(self) -> Result<FolderFactors, ModelError> {
        let path = self.dir.join(WEIGHTS);
        let refused = |reason: String| Err(ModelError::File { path: path.clone(), reason });
        let structure = &self.config.structure;
        if self.recomputes_start() {
            return refused(format!(
                "the adapter began as part of the base weights ({}), and that part is not in the file; attach it to its model and save it again",
                self.config.init
            ));
        }
        if self.layout.is_some_and(|layout| layout.structure != Layout::lora().structure) {
            return refused(format!(
                "holds {structure} in the layout of peft, whose update does not follow from the file alone; attach it to its model and save it as \
                 plain LoRA (`lowrank export --adapter DIR --model MODEL --as lora --rank R`), or merge it"
            ));
        }
        if let Some(name) = self.trains().first() {
            return refused(format!(
                "brings whole weights besides the adapter ({name}); attach it to its model and merge it, or read that model"
            ));
        }
        let mut names = Names::new();
        for (name, _) in self.files.shapes().filter(|(name, _)| !is_copy(name)) {
            let Some((layer, field)) = self.split(name) else {
                let reason = format!("is no tensor of {structure}");
                return Err(ModelError::Tensor { path: path.clone(), tensor: name.to_string(), reason });
            };
            names.entry(layer.to_string()).or_default().insert(field.to_string(), name.to_string());
        }
        let mut layers = Vec::new();
        for (layer, fields) in &names {
            match self.shape(layer, fields) {
                Some(shape) => {
                    let embedding = self.mark.embeddings.contains(layer)
                        || self
                            .layout
                            .is_some_and(|layout| fields.values().any(|name| is_at_embedding(layout, layer, name)));
                    layers.push(LinearLayer { path: layer.clone(), shape, bias: false, embedding });
                }
                None => {
                    return refused(format!(
                        "the sides of {layer} do not follow from its tensors; attach the adapter to its model and save it again"
                    ));
                }
            }
        }
        let mut places = self.config.places(&layers)?;
        for place in &mut places {
            self.mark.sizes.get(&place.path).into_iter().for_each(|size| place.resize(*size));
        }
        if let Some(layer) = names.keys().find(|layer| places.iter().all(|place| place.path != **layer)) {
            return refused(format!("has tensors of {layer}, which the configuration does not adapt"));
        }
        Ok(FolderFactors {
            config: self.config,
            base_model: self.base_model,
            base: self.mark.base,
            path,
            files: self.files,
            names,
            places: places.into_iter().map(|place| (place.path.clone(), place)).collect(),
            shared: SharedTensors::default(),
            recomputed: self.mark.shared,
            layout: self.layout,
        })
    }

    /// Returns true if `peft` reads the folder as it is: a structure that it has, in its layout, without settings of our own.
    pub fn is_form_of_peft(&self) -> bool {
        let started = self.files.shapes().any(|(name, _)| name.contains(".origin."));
        let empty = self.mark.sizes.values().any(|size| size.rank == 0);
        self.layout.is_some() && !started && !empty
    }

    /// Fingerprint of the base weights that the adapter was trained on, if the folder has one.
    pub fn base_fingerprint(&self) -> Option<&str> {
        self.mark.base.as_deref()
    }

    /// The path of the layer and the field that a tensor of the file belongs to.
    fn split<'a>(&self, name: &'a str) -> Option<(&'a str, &'a str)> {
        let (path, rest) = self.layer_of(name.strip_prefix(MODEL)?)?;
        let field = self.layout.map_or(Some(rest), |layout| layout.field(rest));
        Some((path, field.or_else(|| rest.starts_with("origin.").then_some(rest))?))
    }

    /// `[d_in, d_out]` of a layer: stored in the header, or the sides of the first and the last factor.
    fn shape(&self, layer: &str, fields: &BTreeMap<String, String>) -> Option<[usize; 2]> {
        if let Some(shape) = self.mark.shapes.get(layer) {
            return Some(*shape);
        }
        let spec = self.config.entry().ok()?.spec;
        let side = |role: TensorRole, axis: usize| {
            let tensor = spec.tensors.iter().find(|tensor| tensor.role == role && tensor.transposed)?;
            let name = fields.get(tensor.name)?;
            let (_, shape) = self.files.shapes().find(|(known, _)| known == name)?;
            shape.get(axis).copied()
        };
        Some([side(TensorRole::A, 1)?, side(TensorRole::B, 0)?])
    }
}

/// Returns true if a tensor of a layer has the name that it has at an embedding.
fn is_at_embedding(layout: &Layout, layer: &str, name: &str) -> bool {
    let rest =
        name.strip_prefix(MODEL).and_then(|name| name.strip_prefix(layer)).and_then(|rest| rest.strip_prefix('.'));
    rest.is_some_and(|rest| layout.is_of_embedding(rest))
}

impl FolderFactors {
    /// Paths of the layers that are embeddings and have not been read.
    pub fn embeddings(&self) -> BTreeSet<String> {
        self.places.values().filter(|place| place.embedding).map(|place| place.path.clone()).collect()
    }

    /// Layers that have not been read, by path.
    pub fn layers(&self) -> impl Iterator<Item = &Place> {
        self.places.values()
    }

    /// Rank of the factors of a layer that has not been read: initial factors that are subtracted count too.
    pub fn rank(&self, path: &str) -> Option<usize> {
        let started = self.names.get(path).is_some_and(|fields| fields.contains_key("origin.a"));
        self.places.get(path).map(|place| if started { 2 * place.rank } else { place.rank })
    }

    /// The update of the layer with this path; none if the adapter has no such layer, or if it has been read.
    pub fn layer(&mut self, path: &str) -> Result<Option<LayerFactors>, ModelError> {
        let Some(place) = self.places.remove(path) else { return Ok(None) };
        let mut tensors = GivenTensors::new();
        for (field, name) in self.names.remove(path).unwrap_or_default() {
            let shape = self.files.shapes().find(|(known, _)| *known == name).map(|(_, shape)| shape.to_vec());
            let shape = shape.unwrap_or_default();
            tensors.insert(field, TensorData::new(self.files.take(&name, &shape)?, shape));
        }
        if let Some(folded) = self.layout.and_then(|layout| layout.folded.as_ref()) {
            let reason = |reason| AdapterError::Tensor { path: place.path.clone(), tensor: "all".into(), reason };
            (folded.tensors)(&mut tensors).map_err(reason)?;
        }
        let factors = factors_of(&self.config, &place, tensors, &mut self.shared)?;
        if self.places.is_empty() {
            self.check_recomputed()?;
        }
        Ok(Some(factors))
    }

    /// Rejects tensors that were recomputed from the seed and differ from those of the training.
    fn check_recomputed(&self) -> Result<(), ModelError> {
        let Some(written) = &self.recomputed else { return Ok(()) };
        let here = fingerprint_of_shared(&self.shared).map(digits);
        match here.as_ref() == Some(written) {
            true => Ok(()),
            false => Err(ModelError::File {
                path: self.path.clone(),
                reason: format!(
                    "needs tensors that are recomputed from seeds, and they have changed (number {written}, now {}): it was written by another \
                     version of this program",
                    here.as_deref().unwrap_or("none")
                ),
            }),
        }
    }
}

impl Iterator for FolderFactors {
    type Item = Result<LayerFactors, ModelError>;

    fn next(&mut self) -> Option<Self::Item> {
        let path = self.places.keys().next()?.clone();
        self.layer(&path).transpose()
    }
}
