//! Reports of a run: metrics, progress, summary.

use lowrank_models::adapter::AllocationView;

use super::RunError;
use super::report::{EndedBy, Logs, Metrics, StepView, Summary};
use super::training::{Finished, Training, due};
use crate::build::{Architecture, Listener, StageData};
use crate::config::count;
use crate::engine::StepReport;
use crate::process::{MemoryUse, Signal};

impl<M: Architecture> Training<M> {
    pub(super) fn open_logs(&mut self) {
        self.logs = Logs::open(&self.folder, &self.config, self.state.step, &self.console);
        self.logs.parameters(self.state.step, &self.parameters, &self.console);
    }

    pub(super) fn introduce(&self) {
        self.console.line(&format!(
            "{} parameters; {}; run in {}",
            count(self.summary.parameters),
            self.current().data.description(),
            self.folder.path().display()
        ));
        if self.trainer.step > 0 {
            self.console.line(&format!("going on after step {}", self.trainer.step));
        }
    }

    /// Title of the current stage.
    pub(super) fn title(&self) -> String {
        match self.stages.len() {
            1 => "training".into(),
            stages => format!("{} (stage {} of {stages})", self.current().name, self.state.stage + 1),
        }
    }

    /// Summary of a run that was resumed at its end, if it has one.
    pub(super) fn finished_before(&self) -> Option<Summary> {
        let at_end = self.trainer.step > 0 && self.state.stage + 1 == self.stages.len() && self.ending().is_some();
        if !at_end {
            return None;
        }
        let text = std::fs::read_to_string(self.folder.join("summary.json")).ok()?;
        let summary: Summary = serde_json::from_str(&text).ok()?;
        if summary.steps != self.trainer.step || summary.ended_by == Some(EndedBy::Signal) {
            return None;
        }
        self.console.line(&match summary.ended_by {
            Some(EndedBy::Clock) => format!(
                "the time of the run, train.minutes = {}, is up after {} steps; --minutes gives it more",
                self.config.train.minutes,
                count(summary.steps)
            ),
            _ => format!("the run has taken its {} steps already", count(summary.steps)),
        });
        Some(summary)
    }

    pub(super) fn metrics(&mut self, report: &StepReport) -> Metrics {
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
            sent_bytes: (!self.peers.is_alone()).then_some(report.sent_bytes),
            communication_seconds: (!self.peers.is_alone()).then_some(report.communication_seconds),
            rss_bytes: Some(memory.rss),
            peak_rss_bytes: Some(memory.peak),
            weight_bytes: Some(self.summary.weight_bytes),
            gradient_bytes: Some(report.gradient_bytes),
            activation_bytes: report.activation_bytes,
            device_bytes: pool.map(|pool| pool.bytes_in_use),
            device_reserved_bytes: reserved,
            state_bytes: Some(self.summary.optimizer_state_bytes),
            validation_loss: None,
            final_validation_loss: None,
            accuracy: None,
            skipped: report.skipped,
            layers: None,
        }
    }

    pub(super) fn show(&mut self, report: &StepReport, metrics: &Metrics) {
        let logged = due(self.config.log.every, report.step) || metrics.validation_loss.is_some();
        let view = StepView {
            step: report.step,
            total: self.total(),
            loss: report.loss,
            tokens_per_second: metrics.tokens_per_second.unwrap_or(0.0),
            rss_bytes: metrics.rss_bytes.unwrap_or(0),
            seconds_left: self.seconds_left(),
        };
        // Plain lines at every step would be too many.
        let message = report.step == 1 || due(20.max(self.config.log.every), report.step);
        self.console.step(&view, message);
        if report.skipped {
            self.console.warn(&format!("step {}: a value that is not finite; the update was left out", report.step));
        }
        if logged {
            let layers = self.allocation.as_ref().map(AllocationView::layers);
            let metrics = Metrics { layers: self.logs.changed(layers), ..metrics.clone() };
            self.logs.write(&metrics, &self.console);
        }
    }

    /// Time to the end by steps or by the clock, whichever comes first.
    fn seconds_left(&self) -> Option<f64> {
        let a_step = self.throughput.seconds / self.throughput.steps as f64;
        let by_steps = self.total().map(|total| total.saturating_sub(self.trainer.step) as f64 * a_step);
        let by_clock = self.clock.map(|clock| clock.left(self.state.seconds));
        by_steps.into_iter().chain(by_clock).reduce(f64::min)
    }

    /// Completes the summary and writes it.
    pub(super) fn summarise(&mut self, ended_by: EndedBy) -> Result<(), RunError> {
        let summary = &mut self.summary;
        summary.steps = self.trainer.step;
        summary.tokens = self.trainer.tokens;
        summary.skipped_steps = self.trainer.skipped_steps;
        let failures = lowrank_optim::renewal_failures();
        summary.kept_subspaces = failures.zero + failures.not_finite + failures.not_converged;
        summary.seconds = self.state.seconds;
        summary.tokens_per_second = match self.throughput.steps {
            // The run was killed after its last step.
            0 => self.trainer.tokens as f64 / self.state.seconds.max(f64::MIN_POSITIVE),
            _ => self.throughput.tokens as f64 / self.throughput.seconds,
        };
        summary.train_loss = self.state.train_loss;
        summary.validation_loss = self.state.validation_loss.filter(|loss| loss.is_finite());
        summary.best_validation_loss = self.state.best_validation_loss;
        summary.peak_rss_bytes = MemoryUse::now().peak;
        summary.ended_by = Some(ended_by);
        if ended_by == EndedBy::Clock {
            let planned = self.stages[self.state.stage].steps.map(|steps| self.state.stage_step + steps);
            let of = planned.map(|steps| format!(" of {}", count(steps))).unwrap_or_default();
            self.console.line(&format!(
                "train.minutes = {} ended the run after {}{of} steps; the learning rate followed the time",
                self.config.train.minutes,
                count(self.trainer.step)
            ));
        }
        let text = serde_json::to_string_pretty(&self.summary).unwrap_or_default();
        Ok(self.folder.write("summary.json", &text)?)
    }

    pub(super) fn finished(
        self,
        summary: Summary,
        [before, after]: [Option<String>; 2],
        signal: Option<Signal>,
    ) -> Finished {
        let planned = self.current().steps.map(|steps| self.state.stage_step + steps);
        let ask = self.current().data.ask().to_owned();
        let unit = self.current().data.unit();
        Finished { folder: self.folder.path().to_path_buf(), summary, planned, before, after, signal, ask, unit }
    }
}
