//! From the configuration, or a checkpoint, to a run that can begin.

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};
use lowrank_models::adapter::{AdapterConfig, Rule};
use lowrank_models::{Llama, LlamaConfig};
use lowrank_optim::{ModulePath, StateMeter, Stepped, Who};

use super::logs::Logs;
use super::material::Material;
use super::subject::Subject;
use super::{JobError, Training, device, model_config, prepare_data, set_threads, setup};
use crate::checkpoint::{Checkpoints, TrainerState, load_optimizer, load_rule};
use crate::config::{Config, Job};
use crate::engine::{Trainer, TrainerOptions};
use crate::plan::{self, Forecast, Forecaster, Freedom};
use crate::run::{MemoryUse, RunFolder, Screen, Summary, bytes};

impl Training {
    /// Makes everything ready: data, model, folder. With `resume` the folder's newest good checkpoint is loaded.
    /// Where the configuration limits memory, what is free is changed so that the run fits.
    pub fn new(
        mut config: Config,
        freedom: Freedom,
        dir: &Path,
        resume: bool,
        mut screen: Screen,
    ) -> Result<Self, JobError> {
        set_threads(config.train.threads);
        let device = device(&config.train.device)?;
        // A folder that is opened first cannot be taken by another run while the data is prepared; a new one is made last, so that bad
        // input leaves nothing behind.
        let opened = if resume || dir.exists() { Some(RunFolder::open(dir, resume)?) } else { None };
        let forecast: Option<Forecast>;
        let (material, subject) = match config.run.job {
            Job::Pretrain => {
                let prepared = prepare_data(&config, &mut screen)?;
                let (ids, separator) = (prepared.tokenizer.vocab_size(), prepared.tokenizer.separator());
                let llama = |config: &Config| Ok(model_config(&config.model, ids, separator)?.llama);
                let fitted = fitting(config, freedom, &llama, None, &Rule::Plain, &screen)?;
                (config, forecast) = fitted;
                let subject = Subject::of_text(&config, &prepared.tokenizer)?;
                subject.check_length(config.train.seq_len)?;
                (Material::text(&config, prepared)?, subject)
            }
            Job::Finetune => {
                let subject = Subject::of_folder(&config)?;
                let llama = |_: &Config| Ok(subject.hub.llama.clone());
                let fitted = fitting(config, freedom, &llama, subject.adapter(), &subject.rule, &screen)?;
                (config, forecast) = fitted;
                subject.check_length(config.train.seq_len)?;
                (Material::examples(&config, &subject, &mut screen)?, subject)
            }
        };
        let total = config.total_steps(material.train.rows());
        let llama = &subject.hub.llama;
        let schedule = setup::schedule(&config, &llama.parameterization, total)?;
        let cycle = setup::cycle(&config, &llama.parameterization);
        for doubt in setup::doubts(&config, llama, total) {
            screen.warn(&doubt);
        }

        let loaded = match resume {
            true => newest(&config, dir, &screen)?,
            false => None,
        };
        let (data, base) = (material.fingerprint.clone(), subject.base_hash()?);
        if let Some((_, state)) = &loaded {
            let changed = |what: String| {
                Err(JobError::Settings(format!("{what} changed since the run began; bring it back or start a new run")))
            };
            if state.data != data {
                return changed("what the model learns from".into());
            }
            if state.base != base {
                return changed(format!("the model in {}", config.model.name));
            }
        }
        let (model, state) = match &loaded {
            Some((path, state)) => (subject.resume(path, &device)?, state.clone()),
            None => (subject.begin(&config, &material, &schedule, &device, &mut screen)?, TrainerState::default()),
        };
        let meter = StateMeter::new();
        let setup::Optimizer { mut optimizer, rule, parameters } =
            setup::optimizer(&config, &subject.rule, &model, &cycle, &meter)?;
        screen.line(&who_steps(&config.optimizer.name, &parameters));
        if let Some((path, state)) = &loaded {
            optimizer = load_optimizer(optimizer, &meter, path, state.optimizer_tensors)?;
            if let Some(rule) = &rule {
                load_rule(rule, &meter, path, state.rule_tensors)?;
            }
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
        let size = Size::of(&model);
        let summary = Summary {
            weight_bytes: size.tensors.iter().map(|(_, bytes)| bytes).sum(),
            parameters: size.trained,
            forecast_bytes: forecast.map(|forecast| forecast.peak),
            gzip_bits_per_byte: material.held_out.as_ref().map(|text| text.gzip_bits_per_byte),
            ..Summary::default()
        };
        let mut trainer = Trainer::new(model, optimizer, cycle, options).with_rule(rule);
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
        let state = TrainerState { data, base, settings: config.deciding_entries(), ..state };
        Ok(Self {
            config,
            folder,
            material,
            subject,
            trainer,
            total,
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

/// The configuration, changed as little as needed to stay within its limit of memory.
fn fitting(
    config: Config,
    freedom: Freedom,
    llama: &dyn Fn(&Config) -> Result<LlamaConfig, JobError>,
    adapter: Option<&AdapterConfig>,
    rule: &Rule,
    screen: &Screen,
) -> Result<(Config, Option<Forecast>), JobError> {
    let Some(limit) = plan::limit(&config)? else { return Ok((config, None)) };
    if config.train.device != "cpu" {
        screen.warn("the forecast of memory counts what the CPU's operations keep; on a GPU more is needed");
    }
    let hidden_size = llama(&config)?.hidden_size;
    let forecaster = Forecaster::new(llama, adapter, rule, MemoryUse::now().rss);
    let chosen = plan::choose(&config, freedom, hidden_size, &|config| forecaster.forecast(config))?;
    screen.line(&format!("within {}: {}; {} expected", bytes(limit), chosen.told(), bytes(chosen.forecast.peak)));
    Ok((chosen.config, Some(chosen.forecast)))
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

/// What a model takes.
#[derive(Default)]
struct Size {
    path: ModulePath,
    /// Bytes of each tensor by its path.
    tensors: Vec<(String, u64)>,
    /// Values that are trained.
    trained: u64,
}

/// Bytes of each tensor of a model by its path.
pub(crate) fn sizes(model: &Llama) -> Vec<(String, u64)> {
    Size::of(model).tensors
}

impl Size {
    fn of(model: &Llama) -> Self {
        let mut size = Self::default();
        model.visit(&mut size);
        size
    }
}

impl ModuleVisitor for Size {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // An adapter would compose the weight.
        let tensor = param.base();
        let values = tensor.shape().num_elements();
        self.tensors.push((self.path.joined(), (values * tensor.dtype().size()) as u64));
        self.trained += if param.is_require_grad() { values as u64 } else { 0 };
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.val();
        self.tensors.push((self.path.joined(), (tensor.shape().num_elements() * tensor.dtype().size()) as u64));
    }
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
