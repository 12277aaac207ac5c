//! Preparation of a run from a recipe or a checkpoint.

use std::path::{Path, PathBuf};

use lowrank_kernels::instructions::instruction_set;
use lowrank_models::adapter::{AllocationHook, Rule};
use lowrank_models::{ClipClassifier, VisionTransformer};
use lowrank_optim::{AssignedTo, Assignment, Hooks, StateMeter};

use super::allocation::allocation_hook;
use super::checkpoint::{
    CheckpointError, Checkpoints, ExpectedState, StageRecord, TrainerState, folder_hash, restore_training,
};
use super::clock::Clock;
use super::folder::Opening;
use super::peers::{place_of_first, refuse_different};
use super::report::{Console, Logs, Summary};
use super::resume::{self, Bases, Loaded};
use super::validation::Validation;
use super::{Finished, RunError, RunFolder, Training};
use crate::build::{self, Architecture, BuildError, HeldOut, Listener, Size, StageData};
use crate::config::Config;
use crate::engine::{Schedule, Shards, Trainer, TrainerOptions};
use crate::plan::{Forecast, Freedom};
use crate::process::{Peers, adapter_name, device, set_threads};
use crate::recipe::{ModelFiles, Recipe, Stage, TrainedModel};

/// Start of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new run; a folder with results of another one is rejected.
    New,
    /// A new run that replaces the one in the folder.
    Overwrite,
    /// The run in the folder, resumed from its newest checkpoint or from the named one.
    Resume(Option<String>),
}

/// Folder of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Given folder.
    Folder(PathBuf),
    /// The next free `PARENT/NAME-001`.
    Next {
        /// Parent folder.
        parent: PathBuf,
        /// Prefix of its name.
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
    /// Opens the folder if it exists. No other run can use it while the data is prepared.
    fn open_existing(&self, start: &Start) -> Result<Option<RunFolder>, RunError> {
        match self {
            Self::Folder(dir) if !Peers::of_process().is_first() => Ok(Some(RunFolder::follow(dir))),
            Self::Folder(dir) if matches!(start, Start::Resume(_)) || dir.exists() => {
                Ok(Some(RunFolder::open(dir, start.opening())?))
            }
            _ => Ok(None),
        }
    }

    /// Creates and opens the folder.
    fn open(&self, start: &Start) -> Result<RunFolder, RunError> {
        Ok(match self {
            Self::Folder(dir) => RunFolder::open(dir, start.opening())?,
            Self::Next { parent, name } => RunFolder::create_next(parent, name)?,
        })
    }
}

/// Prepares and runs the training of a configuration, with the kind of model that it names; see [`Training::new`].
pub fn train(
    config: Config,
    freedom: Freedom,
    place: &Place,
    start: &Start,
    console: Console,
) -> Result<Finished, RunError> {
    if !build::is_vision(&config.model)? {
        return Training::new(config, freedom, place, start, console)?.run();
    }
    match build::is_clip(&config.model)? {
        true => Training::made_by(Recipe::<ClipClassifier>::images, config, freedom, place, start, console)?.run(),
        false => Training::made_by(Recipe::<VisionTransformer>::images, config, freedom, place, start, console)?.run(),
    }
}

impl Training {
    /// Prepares the run of a configuration on text: data, model, folder. A new folder is created last, so that invalid
    /// input leaves nothing behind. If the configuration limits memory, unset settings are changed so that the run fits.
    pub fn new(
        config: Config,
        freedom: Freedom,
        place: &Place,
        start: &Start,
        console: Console,
    ) -> Result<Self, RunError> {
        Self::made_by(Recipe::of, config, freedom, place, start, console)
    }
}

impl<M: Architecture> Training<M> {
    /// Prepares the run of a configuration like [`Training::new`], for the model of the recipe that `make` creates.
    pub fn made_by(
        make: impl FnOnce(Config, Freedom, &mut dyn Listener) -> Result<Recipe<M>, BuildError>,
        config: Config,
        freedom: Freedom,
        place: &Place,
        start: &Start,
        mut console: Console,
    ) -> Result<Self, RunError> {
        set_threads(config.train.threads);
        let device = device(&config.train.device).map_err(BuildError::from)?;
        if let Some(adapter) = adapter_name(&device) {
            console.line(&format!("device {}: {adapter}", config.train.device));
        }
        let opened = place.open_existing(start)?;
        // The first process tokenizes and caches, and the others read the cache.
        let recipe = Peers::of_process().first_before_others(|| make(config, freedom, &mut console))?;
        Self::ready(recipe, opened, place, start, console)
    }

    /// Prepares the run of a recipe, like [`Training::new`].
    pub fn of_recipe(recipe: Recipe<M>, place: &Place, start: &Start, console: Console) -> Result<Self, RunError> {
        set_threads(recipe.config.train.threads);
        let opened = place.open_existing(start)?;
        Self::ready(recipe, opened, place, start, console)
    }

    fn ready(
        recipe: Recipe<M>,
        opened: Option<RunFolder>,
        place: &Place,
        start: &Start,
        mut console: Console,
    ) -> Result<Self, RunError> {
        let Recipe { mut config, model: subject, mut stages, forecast } = recipe;
        let device = device(&config.train.device).map_err(BuildError::from)?;
        let adapter = adapter_name(&device);
        let (records, bases) = (records(&stages), bases(&subject)?);
        let loaded = load(start, opened.as_ref(), &config, &records, &bases, &console)?;
        let state = loaded.as_ref().map(|loaded| loaded.state.clone()).unwrap_or_default();
        let Some(stage) = stages.get_mut(state.stage) else {
            return Err(BuildError::Settings(format!("the recipe has no stage {}", state.stage)).into());
        };
        let (schedule, total) = schedule(&config, &subject, stage, loaded.as_ref())?;
        let (parameterization, shapes) = (M::parameterization(&subject.hub), M::block_shapes(&subject.hub));
        for warning in build::warnings(&config, &parameterization, &shapes, total) {
            console.warn(&warning);
        }
        let model = match &loaded {
            Some(Loaded { path, .. }) => subject.files(&config, &stage.data).load(path, &device)?,
            None => subject.begin(&config, &stage.data, &schedule, &device, &mut console)?,
        };
        if loaded.is_some() {
            resume::refuse_other_rests(&state, &model, stage.steps, total)?;
        }
        let summary = Summary { device: adapter, ..sizes(&model, stage.data.held_out(), forecast) };
        let meter = StateMeter::new();
        let hook = allocation_hook(&config, &subject, &model, &schedule, (state.stage, state.stage_step), &console)?;
        let allocation = hook.as_ref().map(AllocationHook::view);
        stage.hooks.append(hook.into_iter().fold(Hooks::new(), Hooks::with));
        let (trainer, parameters) = trainer(&config, &subject, model, &meter, stage, schedule, loaded.as_ref())?;
        console.line(&who_steps(&config.optimizer.name, &parameters));
        let validation = Validation::draw(stage.data.validation(), config.eval.batches, config.train.seed);

        let peers = Peers::of_process();
        refuse_different(peers, &config, &records, &bases, trainer.model(), stage.data.train())?;
        let folder = claim(opened, place, start, &mut config)?;
        let checkpoints = checkpoints(folder.path(), &config);
        if loaded.is_some() && peers.is_first() {
            for path in checkpoints.set_aside(state.step)? {
                console.warn(&format!("going back: a later checkpoint is now {}", path.display()));
            }
        }
        let state = TrainerState {
            stages: records,
            base: bases.model,
            adapter: bases.adapter,
            instruction_set: instruction_set().name().to_owned(),
            settings: resume::settings(&config),
            total_steps: total,
            minutes: config.train.minutes,
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
            allocation,
            logs: Logs::default(),
            state,
            summary,
            throughput: Default::default(),
            sampled: None,
            console,
            peers,
        })
    }
}

/// Checkpoint that a run resumes from, if any; rejected if it was started from something else.
fn load(
    start: &Start,
    opened: Option<&RunFolder>,
    config: &Config,
    records: &[StageRecord],
    bases: &Bases,
    console: &Console,
) -> Result<Option<Loaded>, RunError> {
    let (Start::Resume(from), Some(folder)) = (start, opened) else { return Ok(None) };
    let dir = folder.path();
    let loaded = resume::load(&checkpoints(dir, config), from.as_deref(), config, dir, console)?;
    resume::refuse_changed(&loaded.state, records, bases, config)?;
    Ok(Some(loaded))
}

/// Trainer of a stage, new or restored, and the assignment of its parameters.
fn trainer<M: Architecture>(
    config: &Config,
    subject: &TrainedModel<M>,
    model: M,
    meter: &StateMeter,
    stage: &mut Stage<M>,
    schedule: Schedule,
    loaded: Option<&Loaded>,
) -> Result<(Trainer<M>, Vec<Assignment>), RunError> {
    let build::Optimizer { optimizer, hooks, parameters } = build::optimizer(config, &*subject.rule, &model, meter)?;
    if let Some(Loaded { path, .. }) = loaded {
        expected_state(config, subject, &model)?.check(path).map_err(RunError::Damaged)?;
    }
    let shards = shards(config, &*subject.rule, &parameters)?;
    let mut trainer =
        Trainer::new(model, optimizer, hooks, trainer_options(config, schedule.clone())).with_shards(shards)?;
    let before = loaded.map_or([0, 0], |Loaded { state, .. }| [state.stage_step, state.stage_samples]);
    trainer.enter_stage(stage.objective.clone(), std::mem::take(&mut stage.hooks), schedule, before)?;
    if let Some(Loaded { path, state }) = loaded {
        restore_training(&mut trainer, meter, path, state)?;
    }
    Ok((trainer, parameters))
}

/// Division of the optimizer's state among the processes of the run, if the configuration asks for it.
fn shards(config: &Config, rule: &dyn Rule, parameters: &[Assignment]) -> Result<Option<Shards>, BuildError> {
    let peers = Peers::of_process();
    if !config.train.shard_state || peers.is_alone() {
        return Ok(None);
    }
    let bytes = build::parameter_states(config, rule, parameters, config.weights.storage)?;
    let ids = parameters.iter().map(|assignment| assignment.parameter.id);
    Ok(Some(Shards::new(peers, &ids.zip(bytes).collect::<Vec<_>>())))
}

/// Folder of a prepared run: results to be overwritten are removed, and the configuration is written.
fn claim(opened: Option<RunFolder>, place: &Place, start: &Start, config: &mut Config) -> Result<RunFolder, RunError> {
    let folder = match opened {
        Some(folder) => folder,
        None if matches!(place, Place::Next { .. }) => place_of_first(Peers::of_process(), || place.open(start))?,
        None => place.open(start)?,
    };
    if *start == Start::Overwrite {
        folder.clear()?;
    }
    config.run.out = folder.path().to_path_buf();
    folder.write("config.toml", &config.to_toml())?;
    Ok(folder)
}

/// Schedule of a stage, and its number of steps.
fn schedule<M: Architecture>(
    config: &Config,
    subject: &TrainedModel<M>,
    stage: &Stage<M>,
    loaded: Option<&Loaded>,
) -> Result<(Schedule, Option<u64>), BuildError> {
    let parameterization = M::parameterization(&subject.hub);
    let schedule = |steps| build::schedule(config, &parameterization, steps);
    let total = match loaded {
        Some(Loaded { state, .. }) => {
            resume::steps(state, stage.steps, Clock::new(config.train.minutes, state.seconds), &schedule)?
        }
        None => stage.steps,
    };
    // The time limit shortens a schedule but not its warm-up.
    Ok((Schedule { total_steps: total, ..schedule(stage.steps)? }, total))
}

fn checkpoints(dir: &Path, config: &Config) -> Checkpoints {
    Checkpoints::new(dir.join("checkpoints"), config.checkpoint.keep_last, config.checkpoint.keep_best)
}

fn records<M: Architecture>(stages: &[Stage<M>]) -> Vec<StageRecord> {
    let record = |stage: &Stage<M>| StageRecord {
        name: stage.name.clone(),
        data: stage.data.fingerprint().to_owned(),
        held_out: stage.data.held_out_fingerprint().to_owned(),
        steps: stage.steps,
    };
    stages.iter().map(record).collect()
}

fn bases<M: Architecture>(subject: &TrainedModel<M>) -> Result<Bases, CheckpointError> {
    let [model, adapter] = subject.folders().map(|folder| folder.map(folder_hash).transpose());
    Ok(Bases { model: model?, adapter: adapter? })
}

/// State that the optimizer of a configuration keeps, determined with a new one.
fn expected_state<M: Architecture>(
    config: &Config,
    subject: &TrainedModel<M>,
    model: &M,
) -> Result<ExpectedState, RunError> {
    let meter = StateMeter::new();
    let build::Optimizer { optimizer, parameters, .. } = build::optimizer(config, &*subject.rule, model, &meter)?;
    Ok(ExpectedState::of(&optimizer, &meter, model, &parameters)?)
}

/// Sizes of the model and its data, for the summary.
fn sizes<M: Architecture>(model: &M, held_out: Option<&HeldOut>, forecast: Option<Forecast>) -> Summary {
    let size = Size::of(model);
    Summary {
        instruction_set: instruction_set().name().to_owned(),
        weight_bytes: size.tensors.iter().map(|(_, bytes)| bytes).sum(),
        parameters: size.trained,
        forecast_bytes: forecast.map(|forecast| forecast.peak),
        gzip_bits_per_byte: held_out.map(|text| text.gzip_bits_per_byte),
        ..Summary::default()
    }
}

/// Options of the engine.
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

/// Number of parameters per optimizer; TensorBoard has the full list.
fn who_steps(method: &str, parameters: &[Assignment]) -> String {
    let count = |is: fn(&AssignedTo) -> bool| parameters.iter().filter(|assignment| is(&assignment.optimizer)).count();
    let own = count(|who| matches!(who, AssignedTo::Method(_)));
    let tables = count(|who| matches!(who, AssignedTo::Table(..)));
    let small = count(|who| matches!(who, AssignedTo::TooSmall(_)));
    let others = parameters.len() - own - tables;
    let mut text = format!("{method} updates {own} hidden matrices, adamw {others} other parameters");
    for assignment in parameters.iter().filter(|assignment| matches!(assignment.optimizer, AssignedTo::Table(..))) {
        text.push_str(&format!("; {assignment}"));
    }
    if small > 0 {
        text.push_str(&format!(", including {small} hidden matrices too small for this rank"));
    }
    text
}
