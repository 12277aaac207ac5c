//! LLaMA as the model of a run.

use std::path::Path;

use burn::tensor::Device;
use lowrank_models::adapter::{AdapterError, Attach, Report};
use lowrank_models::hub::{self, FileType, FileTypes, HubConfig, ModelFolder};
use lowrank_models::linear::{LinearSteps, RunFacts};
use lowrank_models::{Llama, LlamaSteps, MatrixStorage, Parameterization, RandomWeights, Sampling};
use lowrank_optim::Hooks;

use super::RunData;
use crate::build::{Architecture, BuildError, matrix_storage};
use crate::config::{Config, Job};
use crate::engine::{TrainError, sample_text};

impl Architecture for Llama {
    type Hub = HubConfig;
    type Data = RunData;

    fn storage(config: &Config, hub: &HubConfig, adapted: bool) -> Result<MatrixStorage, BuildError> {
        matrix_storage(config, &hub.llama, adapted)
    }

    fn random(hub: &HubConfig, seed: u64, storage: MatrixStorage, device: &Device) -> Result<Self, BuildError> {
        let mut random = RandomWeights { seed, std: hub.llama.initializer_range };
        Ok(Self::build_stored(&hub.llama, &mut random, storage, device)?)
    }

    fn load(
        hub: &HubConfig,
        folder: &Path,
        seed: u64,
        storage: MatrixStorage,
        device: &Device,
    ) -> Result<Self, BuildError> {
        let (folder, wanted) = (ModelFolder::open(folder)?, &hub.llama.parameterization);
        Ok(match folder.config.llama.parameterization == *wanted {
            true => folder.load_stored(storage, device)?,
            false => folder.load_below(wanted, seed, device)?,
        })
    }

    fn load_saved(hub: &HubConfig, dir: &Path, storage: MatrixStorage, device: &Device) -> Result<Self, BuildError> {
        let model = ModelFolder::open(dir)?.load_trained(storage, device)?;
        match model.config() == &hub.llama {
            true => Ok(model),
            false => Err(other_shape()),
        }
    }

    fn save(
        &self,
        hub: &HubConfig,
        folder: Option<&Path>,
        dtype: Option<FileType>,
        dir: &Path,
    ) -> Result<(), BuildError> {
        let types = match (dtype, folder) {
            (Some(dtype), _) => FileTypes::all(dtype),
            (None, Some(folder)) => ModelFolder::open(folder)?.types()?,
            (None, None) => FileTypes::held(),
        };
        Ok(hub::save_trained(self, &hub.extra, &types, dir, hub::MAX_SHARD_BYTES)?)
    }

    fn save_companions(data: &RunData, folder: Option<&Path>, job: Job, dir: &Path) -> Result<(), BuildError> {
        match (folder, job) {
            // The model's own files contain more than those made from the tokenizer, such as its chat template.
            (Some(folder), Job::Finetune) => Ok(hub::copy_companions(folder, dir)?),
            _ => Ok(data.tokenizer.save(dir)?),
        }
    }

    fn attach(self, attach: Attach) -> Result<(Self, Report), AdapterError> {
        self.attach(attach)
    }

    fn parameterization(hub: &HubConfig) -> Parameterization {
        hub.llama.parameterization.clone()
    }

    fn block_shapes(hub: &HubConfig) -> Vec<[usize; 2]> {
        hub.llama.block_shapes().collect()
    }

    fn linear_steps(&self, seed: u64) -> Option<Box<dyn LinearSteps>> {
        let run = RunFacts { seed, width: self.config().hidden_size };
        self.config().parameterization.method().steps(run)
    }

    fn with_steps(hooks: Hooks<Self>, steps: Box<dyn LinearSteps>) -> Hooks<Self> {
        hooks.with(LlamaSteps(steps))
    }

    fn sample(&self, data: &RunData, config: &Config) -> Result<Option<String>, TrainError> {
        let tokens = config.log.sample_tokens;
        if tokens == 0 {
            return Ok(None);
        }
        let sampling = Sampling { seed: config.train.seed, ..Sampling::default() };
        let (prompt, ends) = (&data.sample.prompt, &data.sample.ends);
        sample_text(self, &data.tokenizer, prompt, ends, tokens, &sampling).map(Some)
    }
}

/// Refusal of a checkpoint that does not belong to its configuration.
pub(super) fn other_shape() -> BuildError {
    BuildError::Settings("the checkpoint holds a model of another shape than the configuration".into())
}
