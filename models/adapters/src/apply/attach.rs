//! Attaching adapters to any Burn module.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, Param, ParamId, Reparameterizer};
use burn::tensor::{Tensor, TensorData};
use lowrank_optim::key_of;

use super::detach::{controls, stacks};
use super::report::{Adapted, Report};
use crate::ground::config::{AdapterConfig, TrainedBiases};
use crate::ground::control::Control;
use crate::ground::error::AdapterError;
use crate::ground::layers::{LinearLayer, adaptable_weights, biases, saved_parameters};
use crate::ground::site::{GivenTensors, Place, SharedTensors, Site, Size};
use crate::ground::spec::{Spec, TensorRole};
use crate::ground::stack::{Adapter, AdapterStack, layer_of, matrix};
use crate::ground::structure::Totals;
use crate::init::origin::origin;

/// Replaces a layer's path for tensors that all layers share.
pub const SHARED: &str = "";

/// Gradients of base weights `[d_in, d_out]`, summed over some samples, row-major on the host, by layer path.
pub type BaseGradients = BTreeMap<String, Vec<f32>>;

/// Attaches an adapter to a module.
///
/// ```no_run
/// # use lowrank_adapters::{AdapterConfig, AdapterError, Attach};
/// # fn example(model: burn::nn::Linear) -> Result<(), AdapterError> {
/// let config = AdapterConfig::new("lora").with_rank(16);
/// let (model, report) = Attach::new(config).to(model)?;
/// println!("{report}");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Attach {
    config: AdapterConfig,
    gradients: BaseGradients,
    tensors: Option<BTreeMap<String, GivenTensors>>,
    sizes: BTreeMap<String, Size>,
    factored: bool,
}

impl Attach {
    /// Creates a new adapter.
    pub fn new(config: AdapterConfig) -> Self {
        Self { config, gradients: BaseGradients::new(), tensors: None, sizes: BTreeMap::new(), factored: false }
    }

    /// Configuration of the adapter.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Adds gradients of the base weights, for initialisations that need them.
    pub fn with_gradients(self, gradients: BaseGradients) -> Self {
        Self { gradients, ..self }
    }

    /// Adds tensors read from a file, by layer path and field name, in the layout of the file; tensors that layers
    /// share are under [`SHARED`] by their names, or with the first layer.
    pub fn with_tensors(self, tensors: BTreeMap<String, GivenTensors>) -> Self {
        Self { tensors: Some(tensors), ..self }
    }

    /// Sets rank and scale of layers that differ from the configuration: those of an adapter that was resized during a
    /// run.
    pub fn with_sizes(self, sizes: BTreeMap<String, Size>) -> Self {
        Self { sizes, ..self }
    }

    /// Declares that all linear layers of the module call [`AdapterStack::linear`] for their output; other layers see
    /// only the composed weight.
    pub fn factored(self) -> Self {
        Self { factored: true, ..self }
    }

    /// Freezes all parameters of the module, attaches the adapter to the matching layers, on top of existing adapters,
    /// and reports the result.
    ///
    /// Fails before anything is changed; the module is lost only if building fails (a missing tensor in a file, not
    /// enough memory).
    pub fn to<M: Module>(self, module: M) -> Result<(M, Report), AdapterError> {
        let found = adaptable_weights(&module)?;
        let names: Vec<LinearLayer> = found.values().cloned().collect();
        let below = stacks(&module);
        let before = controls(&below);
        let entry = self.config.entry()?;
        let mut places = self.config.places(&names)?;
        for place in &mut places {
            self.sizes.get(&place.path).into_iter().for_each(|size| place.resize(*size));
        }
        self.fits(entry.spec, &places, below.values().flatten())?;
        let trained_whole = self.trained_whole(&module, &places)?;
        let mut tensors = self.tensors;
        let given = tensors.as_mut().and_then(|tensors| tensors.remove(SHARED)).unwrap_or_default();
        let shared = SharedTensors { given, ..SharedTensors::default() };
        let shared = joined(shared, &self.config, below.values().flatten())?;
        // Disabled adapters fold into nothing; those that stay are put back below the new one.
        before.iter().for_each(|(control, _)| control.switch(false));
        let module = if below.is_empty() { module } else { module.materialize() };
        before.iter().for_each(|(control, on)| control.switch(*on));

        let control = Control::new(self.config.clone());
        let warnings = [self.config.idle(&names)?, entry.warnings(&places)].concat();
        let mut report =
            Report { structure: entry.spec, control: control.clone(), layers: Vec::new(), whole: 0, warnings };
        let mut builder = Builder {
            config: &self.config,
            factored: self.factored,
            gradients: self.gradients,
            tensors: &mut tensors,
            ids: found.iter().map(|(id, layer)| (*id, layer.path.clone())).collect(),
            places: places.iter().map(|place| (place.path.as_str(), place)).collect(),
            below,
            shared,
            control,
            trained_whole,
            report: &mut report,
            failed: Vec::new(),
        };
        let module = module.apply_reparameterization(&mut builder);
        let (mut failed, unused) = (builder.failed, builder.shared.given);
        let all_read = failed.iter().all(|error| matches!(error, AdapterError::Tensor { .. }));
        if all_read {
            failed.extend(tensors.into_iter().flatten().map(|(path, _)| AdapterError::Tensor {
                path,
                tensor: "all".into(),
                reason: "belong to a layer that the configuration does not adapt".into(),
            }));
        }
        if failed.is_empty()
            && let Some((tensor, _)) = unused.into_iter().next()
        {
            let reason = format!("is not shared by the layers of {}", entry.spec.name);
            failed.push(AdapterError::Tensor { path: "all layers".into(), tensor, reason });
        }
        report.control.set_totals(Totals {
            layers: report.layers.len(),
            trained: report.trained(),
            ranks: report.layers.iter().map(|layer| layer.place.rank).sum(),
        });
        match failed.len() {
            0 => Ok((module, report)),
            1 => Err(failed.remove(0)),
            _ => Err(AdapterError::Several(failed)),
        }
    }

    /// Refuses what the model, its layers and its other adapters do not allow.
    fn fits<'a>(
        &self,
        spec: &Spec,
        places: &[Place],
        below: impl Iterator<Item = &'a Adapter> + Clone,
    ) -> Result<(), AdapterError> {
        if below.clone().any(|attached| attached.control().name() == self.config.name) {
            return Err(AdapterError::Setting {
                key: "adapter.name".into(),
                value: self.config.name.clone(),
                reason: "the model has an adapter of this name; give another, or take that one off first".into(),
            });
        }
        if self.config.dropout > 0.0 && !self.factored {
            return Err(AdapterError::Setting {
                key: "adapter.dropout".into(),
                value: self.config.dropout.to_string(),
                reason:
                    "on layers that are not of this crate an adapter sees the weight alone, not the input; take it away"
                        .into(),
            });
        }
        if spec.changes_bias && !self.factored && places.iter().any(|place| place.bias) {
            return Err(AdapterError::Refused(format!(
                "{} acts on the layer's output with its bias; on layers that are not of this crate it sees the weight alone",
                spec.name
            )));
        }
        if let (Err(reason), false) = (spec.merges, self.factored) {
            return Err(AdapterError::Refused(format!(
                "{} has no update of the weight ({reason}); it works on layers that ask AdapterStack::linear for their output, and on no others",
                spec.name
            )));
        }
        if let Some(other) = below.into_iter().find(|attached| attached.structure.spec().merges.is_err()) {
            return Err(AdapterError::Refused(format!(
                "the model has the adapter \"{}\", which has no update of the weight for another one to stand on; take it off first",
                other.control().name()
            )));
        }
        Ok(())
    }

    /// Parameters of the model that are trained themselves: modules that the configuration saves, and biases.
    fn trained_whole<M: Module>(&self, module: &M, places: &[Place]) -> Result<BTreeSet<ParamId>, AdapterError> {
        let saved = saved_parameters(module, &self.config.modules_to_save)?;
        let adapted = |path: &&String| places.iter().any(|place| layer_of(path) == place.path);
        if let Some(path) = saved.keys().find(adapted) {
            return Err(AdapterError::Setting {
                key: "adapter.modules_to_save".into(),
                value: layer_of(path).to_string(),
                reason: "the layer is adapted as well; take it out of one of both".into(),
            });
        }
        let mut trained: BTreeSet<ParamId> = saved.into_values().collect();
        if self.config.bias == TrainedBiases::None {
            return Ok(trained);
        }
        let of_layer = |path: &str| places.iter().any(|place| path.strip_suffix(".bias") == Some(&place.path));
        let mut biases = biases(module);
        biases.retain(|path, _| self.config.bias == TrainedBiases::All || of_layer(path));
        if biases.is_empty() {
            return Err(AdapterError::Setting {
                key: "adapter.bias".into(),
                value: format!("{:?}", self.config.bias).to_lowercase(),
                reason: "the layers have no biases; remove it".into(),
            });
        }
        trained.extend(biases.into_values());
        Ok(trained)
    }
}

/// Adds the shared tensors of the module's existing adapters, for another adapter of the same structure; rejects one
/// that would bring its own.
pub(super) fn joined<'a>(
    mut shared: SharedTensors,
    config: &AdapterConfig,
    others: impl Iterator<Item = &'a Adapter>,
) -> Result<SharedTensors, AdapterError> {
    for other in others.filter(|other| other.control().config().structure == config.structure) {
        let (theirs, tensors) = (other.control().config(), other.structure().shared());
        if !tensors.is_empty() && theirs.seed != config.seed {
            return Err(AdapterError::Setting {
                key: "adapter.seed".into(),
                value: config.seed.to_string(),
                reason: format!(
                    "all {} of a model share their random tensors, and those of \"{}\" have the seed {}; give this one the same",
                    config.structure, theirs.name, theirs.seed
                ),
            });
        }
        for tensor in tensors {
            if let Some(read) = shared.given.remove(&tensor.key)
                && read != tensor.tensor()
            {
                return Err(AdapterError::Refused(format!(
                    "{} of the file differs from that of \"{}\", and all {} of a model share one: put them on the model one at a time",
                    tensor.key, theirs.name, config.structure
                )));
            }
            shared.made.insert(tensor.key, (tensor.layout.0, tensor.values));
        }
    }
    Ok(shared)
}

struct Builder<'a> {
    config: &'a AdapterConfig,
    factored: bool,
    gradients: BaseGradients,
    tensors: &'a mut Option<BTreeMap<String, GivenTensors>>,
    ids: BTreeMap<ParamId, String>,
    places: BTreeMap<&'a str, &'a Place>,
    below: BTreeMap<String, Vec<Adapter>>,
    shared: SharedTensors,
    control: Control,
    /// Parameters of the model that are trained themselves.
    trained_whole: BTreeSet<ParamId>,
    report: &'a mut Report,
    failed: Vec<AdapterError>,
}

impl Builder<'_> {
    fn attached(&mut self, place: &Place, weight: Tensor<2>, below: &AdapterStack) -> Result<Adapter, AdapterError> {
        let entry = self.config.entry()?;
        let device = weight.device();
        let stored = weight.without_autodiff();
        let weight = match below.stack.is_empty() {
            true => stored.clone(),
            false => below.over(&stored, None).weight().without_autodiff(),
        };
        let given = match self.tensors {
            None => None,
            Some(tensors) => Some(tensors.remove(&place.path).ok_or_else(|| AdapterError::Tensor {
                path: place.path.clone(),
                tensor: "all".into(),
                reason: "are missing".into(),
            })?),
        };
        let gradient = match self.gradients.remove(&place.path) {
            Some(values) if values.len() != place.shape[0] * place.shape[1] => {
                return Err(AdapterError::Refused(format!(
                    "{}: the gradient has {} values, the weight is {:?}",
                    place.path,
                    values.len(),
                    place.shape
                )));
            }
            Some(values) => Some(Tensor::from_data(TensorData::new(values, place.shape), &stored.device())),
            None => None,
        };
        let mut site = Site {
            place,
            name: &self.config.name,
            spec: entry.spec,
            seed: self.config.seed,
            device,
            stored,
            weight,
            gradient,
            given,
            shared: &mut self.shared,
        };
        let structure = entry.build(&self.config.options, &mut site)?;
        if place.embedding && structure.get().factors().is_none() {
            return Err(AdapterError::Refused(format!(
                "{}: {} is no product of two factors, and no other adapter works at an embedding; use lora there, or leave it out",
                place.path, entry.spec.name
            )));
        }
        if !self.factored && structure.get().merged_bias(&site.weight(), None).is_some() {
            return Err(AdapterError::Refused(format!(
                "{}: {} adds a bias; on layers that are not of this crate it sees the weight alone",
                place.path, entry.spec.name
            )));
        }
        let origin = origin(&mut site, structure.get())?;
        site.finish()?;
        let shared = structure.get().shared().into_iter().map(|shared| (shared.key, shared.bytes)).collect();
        let attached = Adapter {
            structure,
            origin,
            control: self.control.clone(),
            layer: key_of(&place.path),
            place: place.clone().into(),
        };
        let count = |frozen: bool| {
            let counted = attached.shapes().into_iter().filter(|tensor| (tensor.role == TensorRole::Frozen) == frozen);
            counted.map(|tensor| tensor.shape.iter().product::<usize>()).sum()
        };
        let (trained, frozen) = (count(false), count(true) + attached.structure().cached_values());
        self.report.layers.push(Adapted { place: place.clone(), trained, frozen, shared });
        Ok(attached)
    }
}

impl Reparameterizer for &mut Builder<'_> {
    type Reparam = AdapterStack;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<AdapterStack>) {
        let trained = self.trained_whole.contains(&param.id) && param.val().device().is_autodiff();
        self.report.whole += if self.trained_whole.contains(&param.id) { param.lazy_shape().num_elements() } else { 0 };
        let param = param.set_require_grad(trained);
        // A file may lack more than one tensor; any other failure stops the build.
        let going_on = self.failed.iter().all(|error| matches!(error, AdapterError::Tensor { .. }));
        let Some(path) = self.ids.get(&param.id).cloned().filter(|_| going_on && D == 2) else {
            return (param, None);
        };
        let stack = self.below.remove(&path).unwrap_or_default();
        // Only the newest adapter is trained.
        let mut below = AdapterStack { stack: stack.into_iter().map(Module::no_grad).collect() };
        if let Some(place) = self.places.get(path.as_str()).copied() {
            match self.attached(place, matrix(param.base()), &below) {
                Ok(attached) => below.stack.push(attached),
                Err(error) => self.failed.push(error),
            }
        }
        (param, (!below.stack.is_empty()).then_some(below))
    }
}
