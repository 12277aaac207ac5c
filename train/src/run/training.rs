//! The run itself.

use std::path::PathBuf;
use std::time::Instant;

use lowrank_models::{Llama, Sampling};
use lowrank_optim::StateMeter;

use super::checkpoint::{Checkpoints, TrainerState, save_training};
use super::report::{Logs, Metrics, Screen, StepView, Summary};
use super::{RunError, RunFolder};
use crate::build::Listener;
use crate::config::{Config, count};
use crate::engine::{Evaluation, StepReport, Trainer, evaluate, sample_text};
use crate::objective::{ModelLoss, Streams, epoch};
use crate::process::{MemoryUse, Signal, Signals};
use crate::recipe::{RunData, TrainedModel};

/// A run between its first and its last step.
pub struct Training {
    pub(super) config: Config,
    pub(super) folder: RunFolder,
    pub(super) data: RunData,
    pub(super) subject: TrainedModel,
    pub(super) trainer: Trainer<Llama>,
    /// Steps of the whole run, where they limit it.
    pub(super) total: Option<u64>,
    pub(super) checkpoints: Checkpoints,
    pub(super) meter: StateMeter,
    pub(super) logs: Logs,
    pub(super) state: TrainerState,
    pub(super) summary: Summary,
    /// Steps of this process, their seconds and tokens.
    pub(super) steps: u64,
    pub(super) step_seconds: f64,
    pub(super) step_tokens: u64,
    pub(super) screen: Screen,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Folder of the run.
    pub folder: PathBuf,
    /// Figures; those of the last evaluation are missing when a signal ended the run.
    pub summary: Summary,
    /// What the model wrote before the first step; none when the run was resumed.
    pub before: Option<String>,
    /// What it wrote after the last.
    pub after: Option<String>,
    /// The signal that ended the run early.
    pub signal: Option<Signal>,
    /// Options of `lowrank generate` that ask the model in the form that it learned from.
    pub ask: String,
}

/// Steps between measurements of the optimizer's state, whose size seldom changes.
const STATE_EVERY: u64 = 100;

impl Training {
    /// Trains to the end, or to the step during which a signal comes.
    pub fn run(mut self) -> Result<Finished, RunError> {
        let signals = Signals::install()
            .map_err(|source| RunError::System { what: "signals cannot be watched".into(), source })?;
        self.introduce();
        let before = if self.trainer.step == 0 { self.sample()? } else { None };
        if let Some(text) = &before {
            self.logs.sample(0, text, &self.screen);
        }
        let (begin, earlier) = (Instant::now(), self.state.seconds);
        let total = self.total;
        let limit = self.limit();
        let over = |step: u64, seconds: f64| {
            total.is_some_and(|total| step >= total) || limit.is_some_and(|limit| seconds >= limit)
        };
        self.screen.begin("training", total.unwrap_or(0));
        let mut saved = self.trainer.step > 0;
        let mut signal = None;
        let mut evaluated = false;
        while !over(self.trainer.step, self.state.seconds) {
            let report = self.step()?;
            self.state.seconds = earlier + begin.elapsed().as_secs_f64();
            signal = signals.requested();
            let last = over(report.step, self.state.seconds);
            let mut metrics = self.metrics(&report);
            let mut improved = false;
            if last && signal.is_none() || due(self.config.eval.every, report.step) {
                improved = self.evaluate(last)?;
                metrics.validation_loss = self.state.validation_loss;
                evaluated = last;
            }
            self.show(&report, &metrics);
            if due(self.config.log.sample_every, report.step)
                && let Some(text) = self.sample()?
            {
                self.logs.sample(report.step, &text, &self.screen);
            }
            saved = last
                || signal.is_some()
                || due(self.config.checkpoint.every, report.step)
                || improved && self.config.checkpoint.keep_best;
            if saved {
                self.save()?;
            }
            if signal.is_some() {
                break;
            }
        }
        self.screen.end();
        if !saved {
            self.save()?;
        }
        let mut after = None;
        if signal.is_none() {
            if !evaluated {
                self.evaluate(true)?;
            }
            after = self.sample()?;
            if let Some(text) = &after {
                self.logs.sample(self.trainer.step, text, &self.screen);
            }
        }
        self.finish(before, after, signal)
    }

    /// Time to the end by steps or by the clock, whichever comes first.
    fn seconds_left(&self) -> Option<f64> {
        let a_step = self.step_seconds / self.steps as f64;
        let by_steps = self.total.map(|total| total.saturating_sub(self.trainer.step) as f64 * a_step);
        let by_clock = self.limit().map(|limit| (limit - self.state.seconds).max(0.0));
        by_steps.into_iter().chain(by_clock).reduce(f64::min)
    }

    /// Seconds that the run may take.
    fn limit(&self) -> Option<f64> {
        (self.config.train.minutes > 0.0).then_some(self.config.train.minutes * 60.0)
    }

    fn introduce(&self) {
        self.screen.line(&format!(
            "{} parameters; {}; run in {}",
            count(self.summary.parameters),
            self.data.told,
            self.folder.path().display()
        ));
        if self.trainer.step > 0 {
            self.screen.line(&format!("going on after step {}", self.trainer.step));
        }
    }

    fn step(&mut self) -> Result<StepReport, RunError> {
        let step = self.trainer.step + 1;
        let measure = self.summary.optimizer_state_bytes == 0 || due(STATE_EVERY, step);
        if measure {
            self.meter.start();
        }
        let (logs, screen) = (&mut self.logs, &self.screen);
        let histograms = due(self.config.log.histograms_every, step);
        let report = self.trainer.step(&Streams::one(&self.data.train), &mut |model, grads| {
            if histograms {
                logs.histograms(step, model, grads, screen);
            }
        })?;
        if measure {
            self.summary.optimizer_state_bytes = self.meter.stop();
        }
        self.summary.gradient_bytes = self.summary.gradient_bytes.max(report.gradient_bytes);
        self.summary.activation_bytes = self.summary.activation_bytes.max(report.activation_bytes);
        self.steps += 1;
        self.step_seconds += report.seconds;
        self.step_tokens += report.tokens;
        self.state.train_loss = Some(report.loss).filter(|loss| loss.is_finite());
        Ok(report)
    }

    fn metrics(&mut self, report: &StepReport) -> Metrics {
        let memory = MemoryUse::now();
        let pool = self.trainer.device().memory_pool_usage();
        let reserved = pool.as_ref().map(|pool| pool.bytes_reserved);
        self.summary.device_reserved_bytes = self.summary.device_reserved_bytes.max(reserved);
        Metrics {
            step: report.step,
            tokens: self.trainer.tokens,
            seconds: self.state.seconds,
            loss: Some(report.loss).filter(|loss| loss.is_finite()),
            lr: Some(report.lr),
            grad_norm: Some(report.grad_norm).filter(|norm| norm.is_finite()),
            tokens_per_second: Some(report.tokens as f64 / report.seconds),
            data_seconds: Some(report.data_seconds),
            rss_bytes: Some(memory.rss),
            peak_rss_bytes: Some(memory.peak),
            weight_bytes: Some(self.summary.weight_bytes),
            gradient_bytes: Some(report.gradient_bytes),
            activation_bytes: report.activation_bytes,
            device_bytes: pool.map(|pool| pool.bytes_in_use),
            device_reserved_bytes: reserved,
            state_bytes: Some(self.summary.optimizer_state_bytes),
            validation_loss: None,
            skipped: report.skipped,
        }
    }

    fn show(&mut self, report: &StepReport, metrics: &Metrics) {
        let logged = due(self.config.log.every, report.step) || metrics.validation_loss.is_some();
        let view = StepView {
            step: report.step,
            total: self.total,
            loss: report.loss,
            tokens_per_second: metrics.tokens_per_second.unwrap_or(0.0),
            rss_bytes: metrics.rss_bytes.unwrap_or(0),
            seconds_left: self.seconds_left(),
        };
        // Plain lines at every step would drown everything else.
        let told = report.step == 1 || due(20.max(self.config.log.every), report.step);
        self.screen.step(&view, told);
        if report.skipped {
            self.screen.warn(&format!("step {}: a value that is not finite; the update was left out", report.step));
        }
        if logged {
            self.logs.write(metrics, &self.screen);
        }
    }

    /// Evaluates on all held-out text, or on the first batches. Returns whether it was the best so far.
    fn evaluate(&mut self, whole: bool) -> Result<bool, RunError> {
        let limit = match (whole, self.config.eval.batches) {
            (true, _) | (_, 0) => usize::MAX,
            (false, batches) => batches,
        };
        let batches = epoch(&self.data.validation, self.trainer.device()).take(limit);
        let found: Evaluation = evaluate(self.trainer.model(), &ModelLoss, batches, |_| true)?;
        let loss = found.loss();
        if whole {
            self.summary.validation_loss = Some(loss);
            let held_out = self.data.held_out.as_ref();
            self.summary.validation_bits_per_byte = held_out.map(|text| found.bits_per_byte(text.bytes));
        }
        self.state.validation_loss = Some(loss);
        let best = self.state.best_validation_loss.is_none_or(|best| loss < best);
        if best {
            self.state.best_validation_loss = Some(loss);
            self.state.best_step = Some(self.trainer.step);
        }
        self.screen.line(&format!("step {}: validation loss {loss:.4}", self.trainer.step));
        Ok(best)
    }

    fn sample(&self) -> Result<Option<String>, RunError> {
        let tokens = self.config.log.sample_tokens;
        if tokens == 0 {
            return Ok(None);
        }
        let sampling = Sampling { seed: self.config.train.seed, ..Sampling::default() };
        let RunData { tokenizer, sample, .. } = &self.data;
        let (prompt, ends) = (&sample.prompt, &sample.ends);
        Ok(Some(sample_text(self.trainer.model(), tokenizer, prompt, ends, tokens, &sampling)?))
    }

    fn save(&mut self) -> Result<(), RunError> {
        let files = self.subject.files(self.config.run.job, &self.data.tokenizer);
        let path = save_training(&self.checkpoints, &self.trainer, &files, &self.meter, self.state.clone())?;
        self.summary.checkpoint = Some(path);
        Ok(())
    }

    fn finish(
        mut self,
        before: Option<String>,
        after: Option<String>,
        signal: Option<Signal>,
    ) -> Result<Finished, RunError> {
        let summary = &mut self.summary;
        summary.steps = self.trainer.step;
        summary.tokens = self.trainer.tokens;
        summary.skipped_steps = self.trainer.skipped_steps;
        let failures = lowrank_optim::renewal_failures();
        summary.kept_subspaces = failures.zero + failures.not_finite + failures.not_converged;
        summary.seconds = self.state.seconds;
        if self.steps > 0 {
            summary.tokens_per_second = self.step_tokens as f64 / self.step_seconds;
        }
        summary.train_loss = self.state.train_loss;
        summary.best_validation_loss = self.state.best_validation_loss;
        summary.peak_rss_bytes = MemoryUse::now().peak;
        let text = serde_json::to_string_pretty(&summary).unwrap_or_default();
        self.folder.write("summary.json", &text)?;
        let folder = self.folder.path().to_path_buf();
        Ok(Finished { folder, summary: self.summary, before, after, signal, ask: self.data.ask })
    }
}

/// Whether something that happens every so many steps happens at this one; 0 is never.
fn due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
