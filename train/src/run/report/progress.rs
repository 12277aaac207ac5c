//! Progress of a run: a bar on a terminal, plain lines elsewhere, nothing in quiet mode.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::build::Listener;
use crate::config::{bytes, duration};

/// Displayed figures of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepView {
    /// Number of the step.
    pub step: u64,
    /// Last step, if known.
    pub total: Option<u64>,
    /// Loss in nats per token.
    pub loss: f64,
    /// Tokens per second.
    pub tokens_per_second: f64,
    /// Resident memory of the process.
    pub rss_bytes: u64,
    /// Time to the end of the run.
    pub seconds_left: Option<f64>,
}

/// Shows progress on the standard error stream.
#[derive(Debug)]
pub struct Console {
    quiet: bool,
    /// True if not even warnings are shown.
    silent: bool,
    bar: Option<ProgressBar>,
    terminal: bool,
}

impl Console {
    /// Creates a console that shows only warnings if `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, silent: false, bar: None, terminal: std::io::stderr().is_terminal() }
    }

    /// Creates the console of a process for which another one reports.
    pub fn silent() -> Self {
        Self { quiet: true, silent: true, bar: None, terminal: false }
    }

    /// Shows one step of training. Without a terminal only steps with `message` print a line.
    pub fn step(&self, view: &StepView, message: bool) {
        let left = view.seconds_left.map(|seconds| format!(", {} left", duration(seconds))).unwrap_or_default();
        let memory = bytes(view.rss_bytes);
        let numbers = format!("loss {:.3}, {:.0} tokens/s, {memory}{left}", view.loss, view.tokens_per_second);
        match &self.bar {
            Some(bar) => {
                bar.set_position(view.step);
                bar.set_message(numbers);
            }
            None if message && !self.quiet => {
                let of = view.total.map(|total| format!(" of {total}")).unwrap_or_default();
                eprintln!("step {}{of}: {numbers}", view.step);
            }
            None => {}
        }
    }
}

impl Listener for Console {
    fn begin(&mut self, title: &str, total: u64) {
        self.end();
        if self.quiet {
            return;
        }
        if !self.terminal {
            eprintln!("{title}");
            return;
        }
        let bar = ProgressBar::with_draw_target((total > 0).then_some(total), ProgressDrawTarget::stderr());
        let template = match total {
            0 => "{prefix} {spinner} {msg}",
            _ => "{prefix} {wide_bar} {percent:>3} % {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(title.to_string());
        self.bar = Some(bar);
    }

    fn advance(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if !self.quiet => eprintln!("{text}"),
            None => {}
        }
    }

    fn warn(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("warning: {text}")),
            None if !self.silent => eprintln!("warning: {text}"),
            None => {}
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
