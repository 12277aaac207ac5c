//! From a recipe, or a checkpoint, to a run that can begin.

use std::path::{Path, PathBuf};

use lowrank_kernels::instructions::instruction_set;
use lowrank_models::Llama;
use lowrank_optim::{AssignedTo, Assignment, StateMeter};

use super::checkpoint::{
    CheckpointError, Checkpoints, ExpectedState, StageRecord, TrainerState, folder_hash, restore_training,
};
use super::clock::Clock;
use super::folder::Opening;
use super::report::{Logs, Screen, Summary};
use super::resume::{self, Bases, Loaded};
use super::validation::Validation;
use super::{RunError, RunFolder, Training};
use crate::build::{self, BuildError, Listener, Size};
use crate::config::Config;
use crate::engine::{Schedule, Trainer, TrainerOptions};
use crate::plan::{Forecast, Freedom};
use crate::process::{device, set_threads};
use crate::recipe::{ModelFiles, Recipe, RunData, Stage, TrainedModel};

/// Start of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new run; a folder with results of another one is refused.
    New,
    /// A new run in place of the one that the folder holds.
    Overwrite,
    /// The run of the folder goes on from its newest checkpoint, or from the one that is named.
    Resume(Option<String>),
}

/// Folder of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// This folder.
    Folder(PathBuf),
    /// The next free `PARENT/NAME-001`.
    Next {
        /// Folder above it.
        parent: PathBuf,
        /// Start of its name.
        name: String,
    },
}

impl Start {
    fn opening(&self) -> Opening {
        match self {
            Self::New => Opening::New,
            Self::Overwrite => Opening::Overwrite,
            Self::Resume(_) => Opening::Resume,
        }
    }
}

impl Place {
    /// Opens the folder where it is there already. It cannot be taken by another run while the data is prepared.
    fn open_existing(&self, start: &Start) -> Result<Option<RunFolder>, RunError> {
        match self {
            Self::Folder(dir) if matches!(start, Start::Resume(_)) || dir.exists() => {
                Ok(Some(RunFolder::open(dir, start.opening())?))
            }
            _ => Ok(None),
        }
    }

    /// Makes and opens the folder.
    fn open(&self, start: &Start) -> Result<RunFolder, RunError> {
        Ok(match self {
            Self::Folder(dir) => RunFolder::open(dir, start.opening())?,
            Self::Next { parent, name } => RunFolder::create_next(parent, name)?,
        })
    }
}

impl Training {
    /// Makes the run of a configuration ready: data, model, folder. A new folder is made last, so that bad input leaves nothing behind.
    /// Where the configuration limits memory, what is free is changed so that the run fits.
    pub fn new(
        config: Config,
        freedom: Freedom,
        place: &Place,
        start: &Start,
        mut screen: Screen,
    ) -> Result<Self, RunError> {
        set_threads(config.train.threads);
        device(&config.train.device).map_err(BuildError::from)?;
        let opened = place.open_existing(start)?;
        let recipe = Recipe::of(config, freedom, &mut screen)?;
        Self::ready(recipe, opened, place, start, screen)
    }

    /// Makes the run of a recipe ready, as [`Training::new`].
    pub fn of_recipe(recipe: Recipe, place: &Place, start: &Start, screen: Screen) -> Result<Self, RunError> {
        set_threads(recipe.config.train.threads);
        let opened = place.open_existing(start)?;
        Self::ready(recipe, opened, place, start, screen)
    }

    fn ready(
        recipe: Recipe,
        opened: Option<RunFolder>,
        place: &Place,
        start: &Start,
        mut screen: Screen,
    ) -> Result<Self, RunError> {
        let Recipe { mut config, model: subject, mut stages, forecast } = recipe;
        let device = device(&config.train.device).map_err(BuildError::from)?;
        let (records, bases) = (records(&stages), bases(&subject)?);
        let loaded = load(start, opened.as_ref(), &config, &records, &bases, &screen)?;
        let state = loaded.as_ref().map(|loaded| loaded.state.clone()).unwrap_or_default();
        let Some(stage) = stages.get_mut(state.stage) else {
            return Err(BuildError::Settings(format!("the recipe has no stage {}", state.stage)).into());
        };
        let (schedule, total) = schedule(&config, &subject, stage, loaded.as_ref())?;
        for warning in build::warnings(&config, &subject.hub.llama, total) {
            screen.warn(&warning);
        }
        let model = match &loaded {
            Some(Loaded { path, .. }) => subject.files(config.run.job, &stage.data.tokenizer).load(path, &device)?,
            None => subject.begin(&config, &stage.data, &schedule, &device, &mut screen)?,
        };
        if loaded.is_some() {
            resume::refuse_other_rests(&state, &model, stage.steps, total)?;
        }
        let summary = sizes(&model, &stage.data, forecast);
        let meter = StateMeter::new();
        let (trainer, parameters) = trainer(&config, &subject, model, &meter, stage, schedule, loaded.as_ref())?;
        screen.line(&who_steps(&config.optimizer.name, &parameters));
        let validation = Validation::draw(&stage.data.validation, config.eval.batches, config.train.seed);

        let folder = claim(opened, place, start, &mut config)?;
        let checkpoints = checkpoints(folder.path(), &config);
        if loaded.is_some() {
            for path in checkpoints.set_aside(state.step)? {
                screen.warn(&format!("going back: a later checkpoint is now {}", path.display()));
            }
        }
        let state = TrainerState {
            stages: records,
            base: bases.model,
            adapter: bases.adapter,
            instruction_set: instruction_set().name().to_owned(),
            settings: resume::settings(&config),
            total_steps: total,
            ..state
        };
        Ok(Self {
            clock: Clock::new(config.train.minutes, state.seconds),
            config,
            folder,
            subject,
            stages,
            trainer,
            validation,
            checkpoints,
            meter,
            parameters,
            logs: Logs::default(),
            state,
            summary,
            pace: Default::default(),
            sampled: None,
            screen,
        })
    }
}

/// The checkpoint that a run goes on from, if it does; refused where it was started with something else.
fn load(
    start: &Start,
    opened: Option<&RunFolder>,
    config: &Config,
    records: &[StageRecord],
    bases: &Bases,
    screen: &Screen,
) -> Result<Option<Loaded>, RunError> {
    let (Start::Resume(from), Some(folder)) = (start, opened) else { return Ok(None) };
    let dir = folder.path();
    let loaded = resume::load(&checkpoints(dir, config), from.as_deref(), config, dir, screen)?;
    resume::refuse_changed(&loaded.state, records, bases, config)?;
    Ok(Some(loaded))
}

/// The trainer of a stage, as new or as it was saved, and the parameters that it steps.
fn trainer(
    config: &Config,
    subject: &TrainedModel,
    model: Llama,
    meter: &StateMeter,
    stage: &mut Stage,
    schedule: Schedule,
    loaded: Option<&Loaded>,
) -> Result<(Trainer<Llama>, Vec<Assignment>), RunError> {
    let build::Optimizer { optimizer, hooks, parameters } = build::optimizer(config, &*subject.rule, &model, meter)?;
    if let Some(Loaded { path, .. }) = loaded {
        expected_state(config, subject, &model)?.check(path).map_err(RunError::Damaged)?;
    }
    let mut trainer = Trainer::new(model, optimizer, hooks, trainer_options(config, schedule.clone()));
    let before = loaded.map_or([0, 0], |Loaded { state, .. }| [state.stage_step, state.stage_samples]);
    trainer.enter_stage(stage.objective.clone(), std::mem::take(&mut stage.hooks), schedule, before);
    if let Some(Loaded { path, state }) = loaded {
        restore_training(&mut trainer, meter, path, state)?;
    }
    Ok((trainer, parameters))
}

/// The folder of a run that is ready: nothing of an earlier one is left that was to be overwritten, and it holds the configuration.
fn claim(opened: Option<RunFolder>, place: &Place, start: &Start, config: &mut Config) -> Result<RunFolder, RunError> {
    let folder = match opened {
        Some(folder) => folder,
        None => place.open(start)?,
    };
    if *start == Start::Overwrite {
        folder.clear()?;
    }
    config.run.out = folder.path().to_path_buf();
    folder.write("config.toml", &config.to_toml())?;
    Ok(folder)
}

/// The schedule of a stage, and the steps that it is laid out for.
fn schedule(
    config: &Config,
    subject: &TrainedModel,
    stage: &Stage,
    loaded: Option<&Loaded>,
) -> Result<(Schedule, Option<u64>), BuildError> {
    let schedule = |steps| build::schedule(config, &subject.hub.llama.parameterization, steps);
    let total = match loaded {
        Some(Loaded { state, .. }) => {
            resume::steps(state, stage.steps, Clock::new(config.train.minutes, state.seconds), &schedule)?
        }
        None => stage.steps,
    };
    // The clock shortens a schedule and leaves its warm-up.
    Ok((Schedule { total_steps: total, ..schedule(stage.steps)? }, total))
}

fn checkpoints(dir: &Path, config: &Config) -> Checkpoints {
    Checkpoints::new(dir.join("checkpoints"), config.checkpoint.keep_last, config.checkpoint.keep_best)
}

fn records(stages: &[Stage]) -> Vec<StageRecord> {
    let record = |stage: &Stage| StageRecord {
        name: stage.name.clone(),
        data: stage.data.fingerprint.clone(),
        held_out: stage.data.held_out_fingerprint.clone(),
        steps: stage.steps,
    };
    stages.iter().map(record).collect()
}

fn bases(subject: &TrainedModel) -> Result<Bases, CheckpointError> {
    let [model, adapter] = subject.folders().map(|folder| folder.map(folder_hash).transpose());
    Ok(Bases { model: model?, adapter: adapter? })
}

/// The state that the optimizer of a configuration keeps, found with one of its own.
fn expected_state(config: &Config, subject: &TrainedModel, model: &Llama) -> Result<ExpectedState, RunError> {
    let meter = StateMeter::new();
    let build::Optimizer { optimizer, parameters, .. } = build::optimizer(config, &*subject.rule, model, &meter)?;
    Ok(ExpectedState::of(&optimizer, &meter, model, &parameters)?)
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

/// How many parameters each optimizer steps; the list stands in TensorBoard.
fn who_steps(method: &str, parameters: &[Assignment]) -> String {
    let count = |is: fn(&AssignedTo) -> bool| parameters.iter().filter(|assignment| is(&assignment.optimizer)).count();
    let own = count(|who| matches!(who, AssignedTo::Method(_)));
    let small = count(|who| matches!(who, AssignedTo::TooSmall(_)));
    let mut text = format!("{method} updates {own} hidden matrices, adamw {} other parameters", parameters.len() - own);
    if small > 0 {
        text.push_str(&format!(", including {small} hidden matrices too small for this rank"));
    }
    text
}
