//! The model that a run trains: its initial state and its checkpoint files.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lowrank_models::adapter::{AdapterConfig, Allocation, Attach, BaseGradients, Rule};
use lowrank_models::analysis::collect_gradients;
use lowrank_models::hub::FileType;
use lowrank_models::hub::peft::{self, Form, PeftFolder};
use lowrank_models::{Llama, MatrixStorage};

use super::ModelFiles;
use crate::build::{self, Architecture, BuildError, Listener, StageData, adapter_folder};
use crate::config::{Config, Job};
use crate::engine::Schedule;

/// Trained model, whole or with an adapter.
pub struct TrainedModel<M: Architecture = Llama> {
    /// Configuration of the model.
    pub hub: M::Hub,
    /// Folder of the initial model.
    pub(super) folder: Option<PathBuf>,
    /// Storage of its matrices.
    pub(super) storage: MatrixStorage,
    /// Adapter, if one is trained instead of the weights.
    pub(super) adapter: Option<AdapterConfig>,
    /// Folder of an adapter whose training is continued.
    pub(super) begun: Option<PathBuf>,
    /// Training rule of the adapter.
    pub rule: Box<dyn Rule>,
    /// Allocation of the adapter, if it has one.
    pub allocation: Option<Box<dyn Allocation>>,
}

impl<M: Architecture> TrainedModel<M> {
    /// Adapter, if one is trained instead of the weights.
    pub fn adapter(&self) -> Option<&AdapterConfig> {
        self.adapter.as_ref()
    }

    /// Folders of the initial model and adapter.
    pub fn folders(&self) -> [Option<&Path>; 2] {
        [self.folder.as_deref(), self.begun.as_deref()]
    }

    /// Returns the model before the first step.
    pub fn begin(
        &self,
        config: &Config,
        data: &M::Data,
        schedule: &Schedule,
        device: &Device,
        listener: &mut dyn Listener,
    ) -> Result<M, BuildError> {
        let (seed, device) = (config.train.seed, device.clone().autodiff());
        let model = match &self.folder {
            Some(folder) => M::load(&self.hub, folder, seed, self.storage, &device)?,
            None => M::random(&self.hub, seed, self.storage, &device)?,
        };
        let Some(adapter) = self.adapter.clone() else { return Ok(model) };
        self.rule.warnings(&adapter).iter().for_each(|warning| listener.warn(warning));
        if let Some(begun) = &self.begun {
            let begun = PeftFolder::open(begun)?;
            begun.warnings.iter().for_each(|warning| listener.warn(warning));
            let (model, report) = begun.attach_by(model, M::attach)?;
            listener.line(&report.to_string());
            return Ok(self.rule.freeze(model.with_trained_head()));
        }
        let mut gradients = BaseGradients::new();
        let adapter = adapter.with_first_rate(schedule.rate(1));
        if adapter.initialisation().is_some_and(|init| init.needs_gradients) {
            gradients = self::gradients(config, &adapter, &model, data, listener)?;
        }
        let (model, report) = model.attach(Attach::new(adapter).with_gradients(gradients))?;
        report.warnings.iter().for_each(|warning| listener.warn(warning));
        listener.line(&report.to_string());
        Ok(self.rule.freeze(model.with_trained_head()))
    }

    /// Format of the model in checkpoints.
    pub fn files<'a>(&'a self, config: &Config, data: &'a M::Data) -> TrainedFiles<'a, M> {
        TrainedFiles { model: self, job: config.run.job, dtype: config.checkpoint.dtype, data }
    }

    /// Model of a folder that is fine-tuned, with the adapter, rule and allocation of the configuration.
    pub(super) fn fine_tuned(config: &Config, hub: M::Hub, folder: PathBuf) -> Result<Self, BuildError> {
        let rule = build::rule(&config.rule)?;
        let allocation = build::allocation(&config.allocation)?;
        let begun = adapter_folder(&config.adapter)?;
        let foreign =
            |begun: &PeftFolder| begun.trains().into_iter().find(|name| !M::is_head(name)).map(str::to_string);
        if let Some(weight) = begun.as_ref().and_then(foreign) {
            return Err(BuildError::Settings(format!(
                "adapter.name = {}: it brings {weight} along, which a checkpoint of the adapter alone would lose; merge it into the model first",
                config.adapter.name
            )));
        }
        let given = match &begun {
            Some(begun) => Some(begun.config.clone()),
            None => build::adapter(config)?,
        };
        let adapter = match given {
            Some(given) => {
                let adapter = rule.prepared(given.clone())?;
                if begun.is_some() && adapter != given {
                    return Err(BuildError::Settings(format!(
                        "rule.name = {}: it would make {} of the {} in {}; set it to plain, or begin with a new adapter",
                        rule.name(),
                        adapter.structure,
                        given.structure,
                        config.adapter.name
                    )));
                }
                match &allocation {
                    None => Some(adapter),
                    Some(allocation) => {
                        let allocated = allocation.prepared(adapter.clone())?;
                        if begun.is_some() && allocated != adapter {
                            return Err(BuildError::Settings(format!(
                                "allocation.name = {}: it needs other options of {} than those of the adapter in {}; set it to none, or begin with a new adapter",
                                allocation.name(),
                                adapter.structure,
                                config.adapter.name
                            )));
                        }
                        Some(allocated)
                    }
                }
            }
            None if rule.trains_weights() => None,
            None => {
                return Err(BuildError::Settings(format!(
                    "rule.name = {}: there is no adapter to train by it; set it to plain, or adapter.name to lora",
                    rule.name()
                )));
            }
        };
        if let (Some(allocation), None) = (&allocation, &adapter) {
            return Err(BuildError::Settings(format!(
                "allocation.name = {}: there is no adapter to allocate ranks of; set it to none, or remove adapter.name",
                allocation.name()
            )));
        }
        if adapter.is_some() {
            rule.check_adapter_alone(&build::optimizer_options(config))?;
        }
        let begun = begun.is_some().then(|| PathBuf::from(&config.adapter.name));
        let storage = M::storage(config, &hub, adapter.is_some())?;
        Ok(Self { hub, storage, folder: Some(folder), adapter, begun, rule, allocation })
    }
}

/// Format of a model, or of an adapter alone, in a checkpoint.
pub struct TrainedFiles<'a, M: Architecture> {
    model: &'a TrainedModel<M>,
    job: Job,
    /// Type of the weights, if not that of the initial model.
    dtype: Option<FileType>,
    data: &'a M::Data,
}

impl<M: Architecture> ModelFiles<M> for TrainedFiles<'_, M> {
    type Error = BuildError;

    fn save(&self, model: &M, dir: &Path) -> Result<(), BuildError> {
        let TrainedModel { hub, folder, adapter, .. } = self.model;
        if let (Some(folder), Some(adapter)) = (folder, adapter) {
            peft::save(model, &adapter.name, Form::Own, Some(&folder.to_string_lossy()), dir)?;
            return M::save_beside_adapter(hub, dir);
        }
        model.save(hub, folder.as_deref(), self.dtype, dir)?;
        M::save_companions(self.data, folder.as_deref(), self.job, dir)
    }

    fn load(&self, dir: &Path, device: &Device) -> Result<M, BuildError> {
        let TrainedModel { hub, folder, storage, adapter, rule, .. } = self.model;
        let device = device.clone().autodiff();
        let (Some(folder), true) = (folder, adapter.is_some()) else {
            return M::load_saved(hub, dir, *storage, &device);
        };
        // The head, if it is a new one, comes with the adapter.
        let base = M::load(hub, folder, 0, *storage, &device)?;
        let (model, _) = PeftFolder::open(dir)?.attach_by(base, M::attach)?;
        Ok(rule.freeze(model.with_trained_head()))
    }
}

/// Gradients of the weights that the adapter will be attached to, over the first rows of the training data.
fn gradients<M: Architecture>(
    config: &Config,
    adapter: &AdapterConfig,
    model: &M,
    data: &M::Data,
    listener: &mut dyn Listener,
) -> Result<BaseGradients, BuildError> {
    let wanted = config.adapter.init_samples;
    let train = data.train();
    let rows = train.rows();
    if wanted == 0 || wanted as u64 > rows {
        return Err(BuildError::Settings(format!(
            "adapter.init_samples = {wanted}: adapter.init = {} needs at least 1, and there are {rows} rows to learn from",
            adapter.init
        )));
    }
    listener.begin("collecting gradients", wanted as u64);
    let device = model.devices().into_iter().next().map_or_else(Device::default, Device::inner);
    let batch = train.batch();
    let mut failed = None;
    let batches = (0..wanted.div_ceil(batch)).map_while(|number| {
        listener.advance((number * batch) as u64);
        let read = train.at((number * batch) as u64, &device);
        read.map(|read| read.batch).map_err(|error| failed = Some(error)).ok()
    });
    let collected = collect_gradients(model, adapter, wanted, batches);
    if let Some(error) = failed {
        return Err(error.into());
    }
    Ok(collected?)
}
