//! Training loop of a run.

use std::path::PathBuf;
use std::time::Instant;

use lowrank_models::Llama;
use lowrank_models::adapter::AllocationView;
use lowrank_optim::{Assignment, Hooks, StateMeter};

use super::allocation::allocation_hook;
use super::checkpoint::{Checkpoints, TrainerState, save_training, send_training, state_bytes};
use super::clock::Clock;
use super::report::{Console, EndedBy, Logs, Metrics, ModuleFile, RankFile, Summary};
use super::validation::Validation;
use super::{RunError, RunFolder};
use crate::build::{self, Architecture, Listener, Scores, StageData};
use crate::config::Config;
use crate::engine::{StepReport, Trainer};
use crate::objective::Streams;
use crate::process::{Peers, Signal, Signals};
use crate::recipe::{Stage, TrainedModel};

/// Run between its first and its last step.
pub struct Training<M: Architecture = Llama> {
    pub(super) config: Config,
    pub(super) folder: RunFolder,
    pub(super) subject: TrainedModel<M>,
    pub(super) stages: Vec<Stage<M>>,
    pub(super) trainer: Trainer<M>,
    pub(super) validation: Validation,
    pub(super) clock: Option<Clock>,
    pub(super) checkpoints: Checkpoints,
    pub(super) meter: StateMeter,
    pub(super) parameters: Vec<Assignment>,
    /// Ranks by layer, where an allocation changes them.
    pub(super) allocation: Option<AllocationView>,
    pub(super) logs: Logs,
    pub(super) state: TrainerState,
    pub(super) summary: Summary,
    pub(super) throughput: Throughput,
    /// Last generated sample, and its step.
    pub(super) sampled: Option<(u64, String)>,
    pub(super) console: Console,
    pub(super) peers: Peers,
}

/// Steps, seconds and tokens of this process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Throughput {
    pub steps: u64,
    pub seconds: f64,
    pub tokens: u64,
}

/// Finished run.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Folder of the run.
    pub folder: PathBuf,
    /// Figures of the run; those of the last evaluation are missing if a signal ended the run.
    pub summary: Summary,
    /// Number of planned steps.
    pub planned: Option<u64>,
    /// Text generated before the first step; none if the run was resumed.
    pub before: Option<String>,
    /// Text generated after the last step.
    pub after: Option<String>,
    /// Signal that ended the run early.
    pub signal: Option<Signal>,
    /// Command that tries the model, with `MODEL` for its options.
    pub ask: String,
    /// Plural of what the loss is counted by.
    pub unit: &'static str,
}

/// End of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Steps,
    Clock,
    Signal(Signal),
}

impl Ending {
    fn signal(self) -> Option<Signal> {
        match self {
            Self::Signal(signal) => Some(signal),
            Self::Steps | Self::Clock => None,
        }
    }

    fn reason(self) -> EndedBy {
        match self {
            Self::Steps => EndedBy::Steps,
            Self::Clock => EndedBy::Clock,
            Self::Signal(_) => EndedBy::Signal,
        }
    }
}

/// Steps between measurements of the optimizer's state, whose size seldom changes.
const STATE_EVERY: u64 = 100;

impl<M: Architecture> Training<M> {
    /// Trains to the end, or to the step during which a signal is received. A run that is already at its end keeps its
    /// results.
    pub fn run(mut self) -> Result<Finished, RunError> {
        let signals = Signals::install()
            .map_err(|source| RunError::System { what: "signals cannot be watched".into(), source })?;
        if let Some(summary) = self.finished_before() {
            return Ok(self.finished(summary, [None, None], None));
        }
        if self.peers.is_first() {
            self.open_logs();
        }
        self.introduce();
        self.summary.peaks.note(|peaks| &mut peaks.start);
        let before = if self.trainer.step == 0 { self.sample()? } else { None };
        let (begin, earlier) = (Instant::now(), self.state.seconds);
        let mut ending = self.stage(&signals, begin, earlier)?;
        while ending == Ending::Steps && self.next_stage()? {
            ending = self.stage(&signals, begin, earlier)?;
        }
        let after = match ending {
            Ending::Signal(_) => None,
            Ending::Steps | Ending::Clock => self.sample()?,
        };
        self.summarise(ending.reason())?;
        let (summary, signal) = (self.summary.clone(), ending.signal());
        Ok(self.finished(summary, [before, after], signal))
    }

    /// Trains to the end of the stage.
    fn stage(&mut self, signals: &Signals, begin: Instant, earlier: f64) -> Result<Ending, RunError> {
        let mut saved = self.trainer.step > 0;
        let mut evaluated = false;
        self.console.begin(&self.title(), self.total().unwrap_or(0));
        let ending = loop {
            if let Some(ending) = self.ending() {
                break ending;
            }
            let report = self.step()?;
            self.summary.peaks.note(|peaks| &mut peaks.step);
            // The clock of the first process and a signal to any of them count for all.
            let seconds = earlier + begin.elapsed().as_secs_f64();
            let (seconds, signal) = self.peers.agree(seconds, signals.requested().map_or(0, Signal::number));
            self.state.seconds = seconds;
            self.follow_clock();
            let (signal, last) = (Signal::of_number(signal), self.ending().is_some());
            let mut metrics = self.metrics(&report);
            evaluated = last && signal.is_none();
            let improved =
                (evaluated || due(self.config.eval.every, report.step)) && self.evaluate(evaluated, &mut metrics)?;
            self.show(&report, &metrics);
            if due(self.config.log.sample_every, report.step) {
                self.sample()?;
            }
            saved = last
                || signal.is_some()
                || due(self.config.checkpoint.every, report.step)
                || improved && self.config.checkpoint.keep_best;
            if saved {
                self.save()?;
            }
            if let Some(signal) = signal {
                break Ending::Signal(signal);
            }
        };
        self.console.end();
        if !saved {
            self.save()?;
        }
        if ending.signal().is_none() && !evaluated {
            self.evaluate(true, &mut Metrics::default())?;
        }
        Ok(ending)
    }

    /// Number of steps taken in the current stage.
    pub(super) fn done(&self) -> u64 {
        self.trainer.step - self.state.stage_step
    }

    /// Last step of the current stage, if its number is known.
    pub(super) fn total(&self) -> Option<u64> {
        self.state.total_steps.map(|steps| self.state.stage_step + steps)
    }

    pub(super) fn current(&self) -> &Stage<M> {
        &self.stages[self.state.stage]
    }

    /// Returns the end that the current stage has reached.
    pub(super) fn ending(&self) -> Option<Ending> {
        let reached = |steps: Option<u64>| steps.is_some_and(|steps| self.done() >= steps);
        let time_is_up = self.clock.is_some_and(|clock| clock.is_over(self.state.seconds));
        match reached(self.current().steps) {
            true => Some(Ending::Steps),
            false => (time_is_up || reached(self.state.total_steps)).then_some(Ending::Clock),
        }
    }

    /// Adjusts the schedule to the steps that fit the remaining time.
    fn follow_clock(&mut self) {
        let (Some(planned), Some(clock)) = (self.current().steps, &mut self.clock) else { return };
        if let Some(fitting) = clock.estimate(self.trainer.step, self.state.seconds) {
            let steps = fitting.saturating_sub(self.state.stage_step).max(self.done()).min(planned);
            self.state.total_steps = Some(steps);
            self.trainer.schedule_mut().total_steps = Some(steps);
        }
    }

    /// Enters the next stage, if there is one.
    fn next_stage(&mut self) -> Result<bool, RunError> {
        let number = self.state.stage + 1;
        let Some(stage) = self.stages.get_mut(number) else { return Ok(false) };
        let parameterization = M::parameterization(&self.subject.hub);
        let schedule = build::schedule(&self.config, &parameterization, stage.steps)?;
        let before = [self.trainer.step, self.trainer.samples];
        let hook = allocation_hook(
            &self.config,
            &self.subject,
            self.trainer.model(),
            &schedule,
            (number, before[0]),
            &self.console,
        )?;
        if let Some(hook) = hook {
            self.allocation = Some(hook.view());
            stage.hooks.append(Hooks::new().with(hook));
        }
        self.trainer.enter_stage(stage.objective.clone(), std::mem::take(&mut stage.hooks), schedule, before)?;
        self.validation = Validation::draw(stage.data.validation(), self.config.eval.batches, self.config.train.seed);
        let state = &mut self.state;
        (state.stage, state.stage_step, state.stage_samples) = (number, before[0], before[1]);
        state.total_steps = stage.steps;
        // The next stage is validated on other text.
        (state.best_validation_loss, state.best_step) = (None, None);
        Ok(true)
    }

    fn step(&mut self) -> Result<StepReport, RunError> {
        let step = self.trainer.step + 1;
        let stage = &self.stages[self.state.stage];
        let (logs, console) = (&mut self.logs, &self.console);
        let histograms = due(self.config.log.histograms_every, step);
        let streams = stage
            .streams
            .iter()
            .fold(Streams::one(stage.data.train()), |streams, (name, stream)| streams.with(name, &**stream));
        let report = self.trainer.step(&streams, &mut |model, grads| {
            if histograms {
                logs.histograms(step, model, grads, console);
            }
        })?;
        let summary = &mut self.summary;
        if self.throughput.steps == 0 || due(STATE_EVERY, step) {
            let (optimizer, hooks) = (self.trainer.optimizer(), self.trainer.hooks());
            summary.note_state(self.peers, state_bytes(optimizer, hooks, &self.meter));
        }
        summary.gradient_bytes = summary.gradient_bytes.max(report.gradient_bytes);
        summary.activation_bytes = summary.activation_bytes.max(report.activation_bytes);
        self.throughput.steps += 1;
        self.throughput.seconds += report.seconds;
        self.throughput.tokens += report.tokens;
        self.state.train_loss = Some(report.loss).filter(|loss| loss.is_finite());
        Ok(report)
    }

    /// Measures the validation loss, at the end on all held-out text as well. Returns true if it is the best so far.
    fn evaluate(&mut self, whole: bool, metrics: &mut Metrics) -> Result<bool, RunError> {
        let (model, device) = (self.trainer.model(), self.trainer.device());
        let data = &self.stages[self.state.stage].data;
        let drawn = self.validation.drawn(self.peers, model, data.validation(), device)?;
        let loss = drawn.loss();
        metrics.validation_loss = Some(loss).filter(|loss| loss.is_finite());
        let mut line = format!("step {}: validation loss {loss:.4}", self.trainer.step);
        if whole {
            let all = match self.validation.is_all() {
                true => drawn,
                false => Validation::all(self.peers, model, data.validation(), device)?,
            };
            let held_out = data.held_out();
            self.summary.final_validation_loss = Some(all.loss());
            self.summary.validation_bits_per_byte = held_out.map(|text| all.bits_per_byte(text.bytes));
            metrics.final_validation_loss = Some(all.loss()).filter(|loss| loss.is_finite());
            line.push_str(&format!(", {:.4} on all held-out {}", all.loss(), data.of_all()));
        }
        let starts = if whole { None } else { self.validation.starts() };
        // The first process reports; the others wait for it at the next step.
        let scores = if self.peers.is_first() { model.scores(data, starts, device)? } else { Scores::default() };
        self.summary.peaks.note(|peaks| &mut peaks.evaluation);
        metrics.accuracy = scores.accuracy;
        if let Some(accuracy) = scores.accuracy {
            line.push_str(&format!(", accuracy {:.2} %", 100.0 * accuracy));
            if whole {
                self.summary.validation_accuracy = Some(accuracy);
            }
        }
        self.logs.pictures(self.trainer.step, &scores.pictures, &self.console);
        self.console.line(&line);
        Ok(self.state.note_validation(self.trainer.step, loss))
    }

    /// Generates a sample and logs it, at most once per step.
    fn sample(&mut self) -> Result<Option<String>, RunError> {
        let step = self.trainer.step;
        if !self.peers.is_first() {
            return Ok(None);
        }
        if let Some((_, text)) = self.sampled.as_ref().filter(|(sampled, _)| *sampled == step) {
            return Ok(Some(text.clone()));
        }
        let sample = self.trainer.model().sample(&self.current().data, &self.config)?;
        let Some(text) = sample else { return Ok(None) };
        self.logs.sample(step, &text, &self.console);
        self.sampled = Some((step, text.clone()));
        Ok(Some(text))
    }

    /// Saves a checkpoint; of several processes the first does so for all, which have the same state or send it theirs.
    fn save(&mut self) -> Result<(), RunError> {
        if !self.peers.is_first() {
            return Ok(send_training(&self.trainer, &self.meter)?);
        }
        let files = self.subject.files(&self.config, &self.current().data);
        let path = save_training(&self.checkpoints, &self.trainer, &files, &self.meter, self.state.clone())?;
        self.summary.checkpoint = Some(path);
        self.summary.peaks.note(|peaks| &mut peaks.save);
        if let Some(view) = &self.allocation {
            self.folder.write("rank.json", &RankFile::of(self.trainer.step, view).text())?;
            if let Some(selected) = ModuleFile::of(self.trainer.step, view) {
                self.folder.write("modules.json", &selected.text())?;
            }
        }
        Ok(())
    }
}

/// Returns true if something that happens every `every` steps happens at this one; 0 means never.
pub(super) fn due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
