//! The model that a run trains: its initial state and its checkpoint files.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lowrank_models::Llama;
use lowrank_models::adapter::{AdapterConfig, Allocation, Attach, BaseGradients, Rule};
use lowrank_models::analysis::collect_gradients;
use lowrank_models::hub::peft::{self, Form, PeftFolder};
use lowrank_models::hub::{self, HubConfig, ModelFolder};

use super::{ModelFiles, RunData};
use crate::build::{BuildError, Listener};
use crate::config::{Config, Job};
use crate::data::Tokenizer;
use crate::engine::Schedule;
use crate::objective::Stream;

/// Trained model, whole or with an adapter.
pub struct TrainedModel {
    /// Configuration of the model.
    pub hub: HubConfig,
    /// Folder of the initial model.
    pub(super) folder: Option<PathBuf>,
    /// Adapter, if one is trained instead of the weights.
    pub(super) adapter: Option<AdapterConfig>,
    /// Folder of an adapter whose training is continued.
    pub(super) begun: Option<PathBuf>,
    /// Training rule of the adapter.
    pub rule: Box<dyn Rule>,
    /// Allocation of the adapter, if it has one.
    pub allocation: Option<Box<dyn Allocation>>,
}

impl TrainedModel {
    /// Adapter, if one is trained instead of the weights.
    pub fn adapter(&self) -> Option<&AdapterConfig> {
        self.adapter.as_ref()
    }

    /// Rejects rows that are longer than the model's positions.
    pub fn check_length(&self, seq_len: usize) -> Result<(), BuildError> {
        let positions = self.hub.llama.longest_sequence();
        match seq_len > positions {
            true => Err(BuildError::Settings(format!(
                "train.seq_len = {seq_len} is longer than the model's {positions} positions; shorten it or raise model.max_position_embeddings"
            ))),
            false => Ok(()),
        }
    }

    /// Folders of the initial model and adapter.
    pub fn folders(&self) -> [Option<&Path>; 2] {
        [self.folder.as_deref(), self.begun.as_deref()]
    }

    /// Returns the model before the first step.
    pub fn begin(
        &self,
        config: &Config,
        data: &RunData,
        schedule: &Schedule,
        device: &Device,
        listener: &mut dyn Listener,
    ) -> Result<Llama, BuildError> {
        let model = match &self.folder {
            Some(folder) => {
                let (folder, wanted) = (ModelFolder::open(folder)?, &self.hub.llama.parameterization);
                match folder.config.llama.parameterization == *wanted {
                    true => folder.load(&device.clone().autodiff())?,
                    false => folder.load_below(wanted, config.train.seed, &device.clone().autodiff())?,
                }
            }
            None => Llama::random(&self.hub.llama, config.train.seed, &device.clone().autodiff())?,
        };
        let Some(adapter) = self.adapter.clone() else { return Ok(model) };
        self.rule.warnings(&adapter).iter().for_each(|warning| listener.warn(warning));
        if let Some(begun) = &self.begun {
            let begun = PeftFolder::open(begun)?;
            begun.warnings.iter().for_each(|warning| listener.warn(warning));
            let (model, report) = begun.attach(model)?;
            listener.line(&report.to_string());
            return Ok(self.rule.freeze(model));
        }
        let mut gradients = BaseGradients::new();
        let adapter = adapter.with_first_rate(schedule.rate(1));
        if adapter.initialisation().is_some_and(|init| init.needs_gradients) {
            gradients = self::gradients(config, &adapter, &model, data, listener)?;
        }
        let (model, report) = model.attach(Attach::new(adapter).with_gradients(gradients))?;
        report.warnings.iter().for_each(|warning| listener.warn(warning));
        listener.line(&report.to_string());
        Ok(self.rule.freeze(model))
    }

    /// Format of the model in checkpoints.
    pub fn files<'a>(&'a self, job: Job, tokenizer: &'a Tokenizer) -> TrainedFiles<'a> {
        TrainedFiles { model: self, job, tokenizer }
    }
}

/// Format of a model, or of an adapter alone, in a checkpoint.
pub struct TrainedFiles<'a> {
    model: &'a TrainedModel,
    job: Job,
    tokenizer: &'a Tokenizer,
}

impl ModelFiles<Llama> for TrainedFiles<'_> {
    type Error = BuildError;

    fn save(&self, model: &Llama, dir: &Path) -> Result<(), BuildError> {
        let TrainedModel { hub, folder, adapter, .. } = self.model;
        if let (Some(folder), Some(adapter)) = (folder, adapter) {
            return Ok(peft::save(model, &adapter.name, Form::Own, Some(&folder.to_string_lossy()), dir)?);
        }
        hub::save(model, &hub.extra, dir, hub::MAX_SHARD_BYTES)?;
        match (folder, self.job) {
            // The model's own files contain more than those made from the tokenizer, such as its chat template.
            (Some(folder), Job::Finetune) => hub::copy_companions(folder, dir)?,
            _ => self.tokenizer.save(dir)?,
        }
        Ok(())
    }

    fn load(&self, dir: &Path, device: &Device) -> Result<Llama, BuildError> {
        let TrainedModel { hub, folder, adapter, rule, .. } = self.model;
        let device = device.clone().autodiff();
        let (Some(folder), true) = (folder, adapter.is_some()) else {
            let model = ModelFolder::open(dir)?.load(&device)?;
            if model.config() != &hub.llama {
                return Err(BuildError::Settings(
                    "the checkpoint holds a model of another shape than the configuration".into(),
                ));
            }
            return Ok(model);
        };
        let base = ModelFolder::open(folder)?.load(&device)?;
        let (model, _) = PeftFolder::open(dir)?.attach(base)?;
        Ok(rule.freeze(model))
    }
}

/// Gradients of the weights that the adapter will be attached to, over the first rows of the training data.
fn gradients(
    config: &Config,
    adapter: &AdapterConfig,
    model: &Llama,
    data: &RunData,
    listener: &mut dyn Listener,
) -> Result<BaseGradients, BuildError> {
    let wanted = config.adapter.init_samples;
    let rows = data.train.rows();
    if wanted == 0 || wanted as u64 > rows {
        return Err(BuildError::Settings(format!(
            "adapter.init_samples = {wanted}: adapter.init = {} needs at least 1, and there are {rows} rows to learn from",
            adapter.init
        )));
    }
    listener.begin("collecting gradients", wanted as u64);
    let device = model.model.norm.weight.val().device().inner();
    let batch = data.train.batch();
    let mut failed = None;
    let batches = (0..wanted.div_ceil(batch)).map_while(|number| {
        listener.advance((number * batch) as u64);
        let read = data.train.at((number * batch) as u64, &device);
        read.map(|read| read.batch).map_err(|error| failed = Some(error)).ok()
    });
    let collected = collect_gradients(model, adapter, wanted, batches);
    if let Some(error) = failed {
        return Err(error.into());
    }
    Ok(collected?)
}
