//! From the configuration, or a checkpoint, to a run that can begin.

use std::path::Path;

use lowrank_kernels::instructions::instruction_set;
use lowrank_models::adapter::{AdapterConfig, Rule};
use lowrank_models::{Llama, LlamaConfig};
use lowrank_optim::{StateMeter, Stepped, Who};

use super::checkpoint::{Checkpoints, TrainerState, folder_hash, restore_training};
use super::report::{Logs, Screen, Summary};
use super::resume::{newest, refuse_changed};
use super::{RunError, RunFolder, Training};
use crate::build::{self, BuildError, Listener, Size, model_config, prepare_data};
use crate::config::{Config, Job, bytes};
use crate::engine::{Schedule, Trainer, TrainerOptions};
use crate::objective::Stream;
use crate::plan::{self, Forecast, Forecaster, Freedom};
use crate::process::{MemoryUse, device, machine_memory, set_threads};
use crate::recipe::{ModelFiles, ReadExamples, RunData, TrainedModel, check_vocabulary};

impl Training {
    /// Makes everything ready: data, model, folder. With `resume` the folder's newest good checkpoint is loaded.
    /// Where the configuration limits memory, what is free is changed so that the run fits.
    pub fn new(
        config: Config,
        freedom: Freedom,
        dir: &Path,
        resume: bool,
        mut screen: Screen,
    ) -> Result<Self, RunError> {
        set_threads(config.train.threads);
        let device = device(&config.train.device).map_err(BuildError::from)?;
        // A folder that is opened first cannot be taken by another run while the data is prepared; a new one is made last, so that bad
        // input leaves nothing behind.
        let opened = if resume || dir.exists() { Some(RunFolder::open(dir, resume)?) } else { None };
        let Prepared { config, forecast, data, subject } = Prepared::of(config, freedom, &mut screen)?;
        let total = config.total_steps(data.train.rows());
        let llama = &subject.hub.llama;
        let schedule = build::schedule(&config, &llama.parameterization, total)?;
        let cycle = build::cycle(&config, &llama.parameterization);
        for warning in build::warnings(&config, llama, total) {
            screen.warn(&warning);
        }

        let loaded = match resume {
            true => newest(&config, dir, &screen)?,
            false => None,
        };
        let base = subject.base().map(folder_hash).transpose()?;
        let state = match &loaded {
            Some((_, state)) => {
                refuse_changed(state, &config, &data, base.as_deref())?;
                state.clone()
            }
            None => TrainerState::default(),
        };
        let model = match &loaded {
            Some((path, _)) => subject.files(config.run.job, &data.tokenizer).load(path, &device)?,
            None => subject.begin(&config, &data, &schedule, &device, &mut screen)?,
        };
        let meter = StateMeter::new();
        let build::Optimizer { optimizer, hooks, parameters } =
            build::optimizer(&config, &subject.rule, &model, &cycle, &meter)?;
        screen.line(&who_steps(&config.optimizer.name, &parameters));
        let summary = sizes(&model, &data, forecast);
        let mut trainer = Trainer::new(model, optimizer, hooks, trainer_options(&config, schedule));
        if let Some((path, state)) = &loaded {
            restore_training(&mut trainer, &meter, path, state)?;
        }

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
        let settings = config.deciding_entries();
        let instruction_set = instruction_set().name().to_owned();
        let state = TrainerState { data: data.fingerprint.clone(), base, instruction_set, settings, ..state };
        Ok(Self {
            config,
            folder,
            data,
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

/// Data and model of a run, with the configuration that fits its limit of memory.
struct Prepared {
    config: Config,
    forecast: Option<Forecast>,
    data: RunData,
    subject: TrainedModel,
}

impl Prepared {
    fn of(mut config: Config, freedom: Freedom, screen: &mut Screen) -> Result<Self, BuildError> {
        match config.run.job {
            Job::Pretrain => {
                let prepared = prepare_data(&config, screen)?;
                let (ids, separator) = (prepared.tokenizer.vocab_size(), prepared.tokenizer.separator());
                let llama = |config: &Config| Ok(model_config(&config.model, ids, separator)?.llama);
                let shape = llama(&config)?;
                complete(&mut config, &shape, screen)?;
                // Token files that were checked are in memory already.
                let mapped = if config.data.verify { 0 } else { prepared.mapped_bytes() };
                let (config, forecast) = fitting(config, freedom, &llama, None, &Rule::Plain, mapped, screen)?;
                let subject = TrainedModel::of_text(&config, &prepared.tokenizer)?;
                subject.check_length(config.train.seq_len)?;
                let rows = subject.hub.llama.vocab_size;
                if let Some(warning) = check_vocabulary(ids, rows, Path::new(&config.model.name))? {
                    screen.warn(&warning);
                    prepared.check_ids(rows)?;
                }
                Ok(Self { data: RunData::text(&config, prepared)?, config, forecast, subject })
            }
            Job::Finetune => {
                let subject = TrainedModel::of_folder(&config)?;
                complete(&mut config, &subject.hub.llama, screen)?;
                subject.check_length(config.train.seq_len)?;
                let examples = ReadExamples::read(&config, &subject.hub, screen)?;
                let llama = |_: &Config| Ok(subject.hub.llama.clone());
                let (config, forecast) = fitting(config, freedom, &llama, subject.adapter(), &subject.rule, 0, screen)?;
                Ok(Self { data: examples.into_rows(&config)?, config, forecast, subject })
            }
        }
    }
}

/// Fills in what follows from the model's shape, and rejects sizes beyond the memory of the machine.
fn complete(config: &mut Config, llama: &LlamaConfig, screen: &Screen) -> Result<(), BuildError> {
    if let Some(rank) = build::usual_rank(config, llama.hidden_size) {
        screen.line(&format!(
            "optimizer.options.rank = {rank}: a quarter of the model's width, since {} needs a rank and none is given",
            config.optimizer.name
        ));
    }
    build::check_sizes(config, llama, machine_memory())
}

/// Sizes of the model and its data, for the summary.
fn sizes(model: &Llama, data: &RunData, forecast: Option<Forecast>) -> Summary {
    let size = Size::of(model);
    Summary {
        instruction_set: instruction_set().name().to_owned(),
        weight_bytes: size.tensors.iter().map(|(_, bytes)| bytes).sum(),
        parameters: size.trained,
        forecast_bytes: forecast.map(|forecast| forecast.peak),
        gzip_bits_per_byte: data.held_out.as_ref().map(|text| text.gzip_bits_per_byte),
        ..Summary::default()
    }
}

/// Settings of the engine.
fn trainer_options(config: &Config, schedule: Schedule) -> TrainerOptions {
    TrainerOptions {
        schedule,
        accumulation: config.train.accumulation,
        clip: (config.optimizer.clip > 0.0).then_some(config.optimizer.clip),
        max_skipped_steps: config.train.max_skipped_steps,
        backward: config.train.backward,
        block_clip: (config.optimizer.block_clip > 0.0).then_some(config.optimizer.block_clip),
    }
}

/// The configuration, changed as little as needed to stay within its limit of memory.
fn fitting(
    config: Config,
    freedom: Freedom,
    llama: &dyn Fn(&Config) -> Result<LlamaConfig, BuildError>,
    adapter: Option<&AdapterConfig>,
    rule: &Rule,
    mapped: u64,
    screen: &Screen,
) -> Result<(Config, Option<Forecast>), BuildError> {
    let Some(limit) = plan::limit(&config)? else { return Ok((config, None)) };
    if config.train.device != "cpu" {
        screen.warn("the forecast of memory counts what the CPU's operations keep; on a GPU more is needed");
    }
    let hidden_size = llama(&config)?.hidden_size;
    // Tokenizer, examples and token files are there already.
    let begun = MemoryUse::now();
    if begun.peak > limit {
        screen.warn(&format!("reading the data took {} already, more than train.memory", bytes(begun.peak)));
    }
    let forecaster = Forecaster::new(llama, adapter, rule, begun.rss + mapped);
    let chosen = plan::choose(&config, freedom, hidden_size, &|config| forecaster.forecast(config))?;
    screen.line(&format!("within {}: {}; {} expected", bytes(limit), chosen.told(), bytes(chosen.forecast.peak)));
    Ok((chosen.config, Some(chosen.forecast)))
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
