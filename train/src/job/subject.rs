//! What a run trains: where it begins and what its checkpoints hold.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lowrank_models::Llama;
use lowrank_models::adapter::{AdapterConfig, Attach, BaseGradients, Rule, collect_gradients};
use lowrank_models::hub::peft::{self, Form, PeftFolder};
use lowrank_models::hub::{self, HubConfig, ModelFolder};
use lowrank_optim::rules::LoraProMode;

use super::material::Material;
use super::{JobError, adapter, model_config, setup};
use crate::checkpoint::{CheckpointError, folder_hash};
use crate::config::{Config, Job};
use crate::data::Tokenizer;
use crate::engine::{Schedule, batch_tensors};
use crate::run::Screen;

/// A model, whole or with an adapter.
pub(super) struct Subject {
    pub hub: HubConfig,
    /// Folder of the model to begin with.
    folder: Option<PathBuf>,
    /// The adapter, where one is trained instead of the weights.
    adapter: Option<AdapterConfig>,
    /// Folder that the adapter is read from before the first step, where it is trained on.
    begun: Option<PathBuf>,
    pub rule: Rule,
}

impl Subject {
    /// A model that learns from text, new or from a folder.
    pub fn of_text(config: &Config, tokenizer: &Tokenizer) -> Result<Self, JobError> {
        Ok(Self {
            hub: model_config(&config.model, tokenizer.vocab_size(), tokenizer.separator())?,
            folder: setup::model_folder(&config.model).map(Path::to_path_buf),
            adapter: None,
            begun: None,
            rule: Rule::Plain,
        })
    }

    /// A model of a folder that learns from examples.
    pub fn of_folder(config: &Config) -> Result<Self, JobError> {
        if config.model.name.is_empty() {
            return Err(JobError::Settings("name the folder of the model to fine-tune with --model DIR".into()));
        }
        let folder = PathBuf::from(&config.model.name);
        let hub = ModelFolder::open(&folder)?.config;
        let rule = adapter::rule(&config.rule)?;
        let begun = adapter::begun(&config.adapter)?;
        let given = match &begun {
            Some(begun) => Some(begun.config.clone()),
            None => adapter::adapter(config)?,
        };
        let adapter = match given {
            Some(given) => {
                let adapter = rule.prepare(given.clone())?;
                if begun.is_some() && adapter != given {
                    return Err(JobError::Settings(format!(
                        "rule.name = {}: it would make {} of the {} in {}; set it to plain, or begin with a new adapter",
                        rule.name(),
                        adapter.structure,
                        given.structure,
                        config.adapter.name
                    )));
                }
                Some(adapter)
            }
            None if rule == Rule::Plain => None,
            None => {
                return Err(JobError::Settings(format!(
                    "rule.name = {}: there is no adapter to train by it; set it to plain, or adapter.name to lora",
                    rule.name()
                )));
            }
        };
        let decay = config.optimizer.weight_decay;
        if decay > 0.0 && matches!(rule, Rule::LoraPro { mode: LoraProMode::Full, .. }) {
            return Err(JobError::Settings(format!(
                "optimizer.weight_decay = {decay} with rule lora-pro in mode full: it would shrink the weights below the adapter, and a checkpoint holds the adapter alone; set it to 0, or rule.options.mode to efficient"
            )));
        }
        let begun = begun.is_some().then(|| PathBuf::from(&config.adapter.name));
        Ok(Self { hub, folder: Some(folder), adapter, begun, rule })
    }

    /// The adapter, where one is trained instead of the weights.
    pub fn adapter(&self) -> Option<&AdapterConfig> {
        self.adapter.as_ref()
    }

    /// Refuses rows that are longer than the model's positions.
    pub fn check_length(&self, seq_len: usize) -> Result<(), JobError> {
        let positions = self.hub.llama.max_position_embeddings;
        match seq_len > positions {
            true => Err(JobError::Settings(format!(
                "train.seq_len = {seq_len} is longer than the model's {positions} positions; shorten it or raise model.max_position_embeddings"
            ))),
            false => Ok(()),
        }
    }

    /// Hash of the folder that an adapter stands on.
    pub fn base_hash(&self) -> Result<Option<String>, JobError> {
        match (&self.folder, &self.adapter) {
            (Some(folder), Some(_)) => Ok(Some(folder_hash(folder)?)),
            _ => Ok(None),
        }
    }

    /// The model before the first step.
    pub fn begin(
        &self,
        config: &Config,
        material: &Material,
        schedule: &Schedule,
        device: &Device,
        screen: &mut Screen,
    ) -> Result<Llama, JobError> {
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
        let Some(mut adapter) = self.adapter.clone() else { return Ok(model) };
        self.rule.warnings(&adapter).iter().for_each(|warning| screen.warn(warning));
        if let Some(begun) = &self.begun {
            let begun = PeftFolder::open(begun)?;
            begun.warnings.iter().for_each(|warning| screen.warn(warning));
            let (model, report) = begun.attach(model)?;
            screen.line(&report.to_string());
            return Ok(self.rule.freeze(model));
        }
        let mut gradients = BaseGradients::new();
        if adapter.init == "lora-sb" {
            // The update that the first step of Adam would make.
            if !adapter.options.contains_key("init_step_size") {
                adapter = adapter.with_option("init_step_size", schedule.rate(1));
            }
            gradients = self::gradients(config, &adapter, &model, material, screen)?;
        }
        let (model, report) = model.attach(Attach::new(adapter).with_gradients(gradients))?;
        report.warnings.iter().for_each(|warning| screen.warn(warning));
        screen.line(&report.to_string());
        Ok(self.rule.freeze(model))
    }

    /// The model of a checkpoint.
    pub fn resume(&self, checkpoint: &Path, device: &Device) -> Result<Llama, JobError> {
        let device = device.clone().autodiff();
        let (Some(folder), true) = (&self.folder, self.adapter.is_some()) else {
            let model = ModelFolder::open(checkpoint)?.load(&device)?;
            if model.config() != &self.hub.llama {
                return Err(JobError::Settings(
                    "the checkpoint holds a model of another shape than the configuration".into(),
                ));
            }
            return Ok(model);
        };
        let base = ModelFolder::open(folder)?.load(&device)?;
        let (model, _) = PeftFolder::open(checkpoint)?.attach(base)?;
        Ok(self.rule.freeze(model))
    }

    /// Writes the model, or the adapter alone, into the folder of a checkpoint.
    pub fn save(&self, job: Job, model: &Llama, material: &Material, dir: &Path) -> Result<(), CheckpointError> {
        if let (Some(folder), Some(adapter)) = (&self.folder, &self.adapter) {
            return Ok(peft::save(model, &adapter.name, Form::Own, Some(&folder.to_string_lossy()), dir)?);
        }
        hub::save(model, &self.hub.extra, dir, hub::MAX_SHARD_BYTES)?;
        match (&self.folder, job) {
            // The model's own files say more than what is made of the tokenizer: its chat template is among them.
            (Some(folder), Job::Finetune) => hub::copy_companions(folder, dir)?,
            _ => material.tokenizer.save(dir)?,
        }
        Ok(())
    }
}

/// Gradients of the weights that the adapter will stand on, over the first rows of the training data.
fn gradients(
    config: &Config,
    adapter: &AdapterConfig,
    model: &Llama,
    material: &Material,
    screen: &mut Screen,
) -> Result<BaseGradients, JobError> {
    let wanted = config.adapter.init_samples;
    let rows = material.train.rows();
    if wanted == 0 || wanted as u64 > rows {
        return Err(JobError::Settings(format!(
            "adapter.init_samples = {wanted}: the start lora-sb needs at least 1, and there are {rows} rows to learn from"
        )));
    }
    screen.begin("collecting gradients", wanted as u64);
    let device = model.model.norm.weight.val().device().inner();
    let batch = material.train.batch();
    let mut failed = None;
    let batches = (0..wanted.div_ceil(batch)).map_while(|number| {
        screen.advance((number * batch) as u64);
        let read = material.train.at((number * batch) as u64);
        read.map_err(|error| failed = Some(error)).ok()
    });
    let batches = batches.map(|batch| batch_tensors(&batch, config.data.document_mask, &device));
    let collected = collect_gradients(model, adapter, wanted, batches);
    if let Some(error) = failed {
        return Err(error.into());
    }
    Ok(collected?)
}
