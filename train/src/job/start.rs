//! From the configuration, or a checkpoint, to a run that can begin.

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor};
use lowrank_models::Llama;
use lowrank_models::hub::{HubConfig, ModelFolder};
use lowrank_optim::{StateMeter, Stepped, Who};

use super::logs::Logs;
use super::{JobError, Pretrain, device, model_config, prepare_data, set_threads, setup};
use crate::checkpoint::{Checkpoints, TrainerState, load_optimizer};
use crate::config::Config;
use crate::data::Batches;
use crate::engine::{Trainer, TrainerOptions};
use crate::run::{RunFolder, Screen, Summary};

impl Pretrain {
    /// Makes everything ready: data, model, folder. With `resume` the folder's newest good checkpoint is loaded.
    pub fn new(config: Config, dir: &Path, resume: bool, mut screen: Screen) -> Result<Self, JobError> {
        set_threads(config.train.threads);
        let device = device(&config.train.device)?;
        // A folder that is opened first cannot be taken by another run while the data is prepared; a new one is made last, so that bad
        // input leaves nothing behind.
        let opened = if resume || dir.exists() { Some(RunFolder::open(dir, resume)?) } else { None };
        let prepared = prepare_data(&config, &mut screen)?;
        let hub = model_config(&config.model, prepared.tokenizer.vocab_size(), prepared.tokenizer.separator())?;
        let positions = hub.llama.max_position_embeddings;
        if config.train.seq_len > positions {
            return Err(JobError::Settings(format!(
                "train.seq_len = {} is longer than the model's {positions} positions; shorten it or raise model.max_position_embeddings",
                config.train.seq_len
            )));
        }
        let schedule = setup::schedule(&config, &hub.llama.parameterization)?;
        let cycle = setup::cycle(&config, &hub.llama.parameterization);
        for doubt in setup::doubts(&config, &hub.llama) {
            screen.warn(&doubt);
        }
        let (batch, seq_len) = (config.train.batch, config.train.seq_len);
        let batches = Batches::train(prepared.train.clone(), batch, seq_len, config.train.seed)?;
        let validation = Batches::validation(prepared.validation.clone(), batch, seq_len)?;

        let loaded = match resume {
            true => newest(&config, dir, &screen)?,
            false => None,
        };
        let (model, state) = match &loaded {
            Some((path, state)) => (ModelFolder::open(path)?.load(&device.clone().autodiff())?, state.clone()),
            None => (begin(&config, &hub, &device)?, TrainerState::default()),
        };
        if loaded.is_some() && model.config() != &hub.llama {
            return Err(JobError::Settings(
                "the checkpoint holds a model of another shape than the configuration".into(),
            ));
        }
        // Names every token file with its hash, and the tokenizer.
        let data = prepared.train.manifest().sha256.clone();
        if loaded.is_some() && state.data != data {
            return Err(JobError::Settings(
                "the training text changed since the run began; bring it back or start a new run".into(),
            ));
        }
        let meter = StateMeter::new();
        let (mut optimizer, parameters) = setup::optimizer(&config, &model, &cycle, &meter)?;
        screen.line(&who_steps(&config.optimizer.name, &parameters));
        if let Some((path, state)) = &loaded {
            optimizer = load_optimizer(optimizer, path, state.optimizer_tensors)?;
        }
        let options = TrainerOptions {
            schedule,
            accumulation: config.train.accumulation,
            clip: (config.optimizer.clip > 0.0).then_some(config.optimizer.clip),
            max_skipped_steps: config.train.max_skipped_steps,
            document_mask: config.data.document_mask,
            backward: config.train.backward,
            block_clip: (config.optimizer.block_clip > 0.0).then_some(config.optimizer.block_clip),
        };
        let mut summary = Summary {
            weight_bytes: weight_bytes(&model),
            parameters: hub.llama.parameters() as u64,
            ..Summary::default()
        };
        summary.gzip_bits_per_byte = Some(prepared.facts.gzip_bits_per_byte);
        let mut trainer = Trainer::new(model, optimizer, cycle, options);
        (trainer.step, trainer.samples, trainer.tokens) = (state.step, state.samples, state.tokens);
        trainer.skipped_steps = state.skipped_steps;

        let folder = match opened {
            Some(folder) => folder,
            None => RunFolder::open(dir, false)?,
        };
        folder.write("config.toml", &config.to_toml())?;
        let checkpoints =
            Checkpoints::new(folder.join("checkpoints"), config.checkpoint.keep_last, config.checkpoint.keep_best);
        checkpoints.clean()?;
        let mut logs = Logs::open(&folder, &config, state.step, &screen);
        logs.parameters(state.step, &parameters, &screen);
        let state = TrainerState { data, settings: config.deciding_entries(), ..state };
        Ok(Self {
            config,
            folder,
            prepared,
            hub,
            trainer,
            batches,
            validation,
            checkpoints,
            meter,
            logs,
            state,
            summary,
            steps: 0,
            step_seconds: 0.0,
            step_tokens: 0,
            screen,
        })
    }
}

/// The newest good checkpoint with its state. Warns of newer ones that are not good, and refuses one begun with other settings.
fn newest(config: &Config, dir: &Path, screen: &Screen) -> Result<Option<(PathBuf, TrainerState)>, JobError> {
    let (good, bad) = Checkpoints::new(dir.join("checkpoints"), 1, false).newest_good()?;
    let Some(path) = good else {
        // A run that was stopped before its first checkpoint begins anew; damaged checkpoints are another matter.
        if bad.is_empty() {
            return Ok(None);
        }
        let reasons: String = bad.iter().map(|error| format!("\n  {error}")).collect();
        return Err(JobError::NoCheckpoint { path: dir.to_path_buf(), reasons });
    };
    for reason in &bad {
        screen.warn(&format!("passing over a checkpoint: {reason}"));
    }
    let state = TrainerState::read(&path)?;
    let differences = setup::differences(&state.settings, &config.deciding_entries());
    if !differences.is_empty() {
        return Err(JobError::OtherSettings { path: dir.to_path_buf(), differences: differences.join("\n") });
    }
    Ok(Some((path, state)))
}

/// A new model, or the one that the configuration names, with its weights below the parameterization that is asked for.
fn begin(config: &Config, hub: &HubConfig, device: &Device) -> Result<Llama, JobError> {
    let device = device.clone().autodiff();
    Ok(match setup::model_folder(&config.model) {
        Some(folder) => {
            let folder = ModelFolder::open(folder)?;
            match folder.config.llama.parameterization == hub.llama.parameterization {
                true => folder.load(&device)?,
                false => folder.load_below(&hub.llama.parameterization, config.train.seed, &device)?,
            }
        }
        None => Llama::random(&hub.llama, config.train.seed, &device)?,
    })
}

fn weight_bytes(model: &Llama) -> u64 {
    struct Bytes(u64);
    impl ModuleVisitor for Bytes {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = param.val();
            self.0 += (tensor.shape().num_elements() * tensor.dtype().size()) as u64;
        }

        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            let tensor = param.val();
            self.0 += (tensor.shape().num_elements() * tensor.dtype().size()) as u64;
        }
    }
    let mut bytes = Bytes(0);
    model.visit(&mut bytes);
    bytes.0
}

/// How many parameters each optimizer steps; the list stands in TensorBoard.
fn who_steps(method: &str, parameters: &[Stepped]) -> String {
    let count = |is: fn(&Who) -> bool| parameters.iter().filter(|stepped| is(&stepped.who)).count();
    let own = count(|who| matches!(who, Who::Method(_)));
    let small = count(|who| matches!(who, Who::TooSmall(_)));
    let mut text = format!("{method} steps {own} parameters, adamw {}", parameters.len() - own);
    if small > 0 {
        text.push_str(&format!("; {small} of these are hidden matrices whose projected side is smaller than the rank"));
    }
    text
}
