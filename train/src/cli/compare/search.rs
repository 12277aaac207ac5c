//! A method at several learning rates, and the best of its runs.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use super::common::Common;
use super::trial::{Failure, Trial, trial};
use crate::build::Listener;
use crate::process::Signals;
use crate::run::report::Console;

/// Method that takes part in a comparison.
pub struct Contender {
    pub name: &'static str,
    /// Initial learning rates.
    pub lrs: Vec<f64>,
    /// Training command, without learning rate and folder.
    pub command: Vec<String>,
}

/// Row of the table.
pub struct Row {
    pub name: &'static str,
    /// Number of learning rates that were tried.
    pub tried: usize,
    /// Best run, or the reason why there is none.
    pub best: Result<Trial, Failure>,
    /// Losses of the best learning rate, one of each seed.
    pub losses: Vec<f64>,
}

/// The runs of a method so far.
pub struct Search<'a> {
    name: &'static str,
    command: Vec<String>,
    trials: Vec<Trial>,
    failures: Vec<(f64, Failure)>,
    out: &'a Path,
    console: &'a Console,
    signals: &'a Signals,
}

/// Result, unless a signal stopped a run, whose exit code it is then.
pub type Unstopped<T> = ControlFlow<ExitCode, T>;

impl<'a> Search<'a> {
    /// Trains with every learning rate, and with further ones while the best is at an end, `most` in all.
    pub fn run(
        contender: Contender,
        common: &Common,
        most: usize,
        (out, console, signals): (&'a Path, &'a Console, &'a Signals),
    ) -> anyhow::Result<Unstopped<Self>> {
        let Contender { name, lrs, mut command } = contender;
        command.extend(common.set.iter().flat_map(|setting| ["--set".to_string(), setting.clone()]));
        let mut search = Self { name, command, trials: Vec::new(), failures: Vec::new(), out, console, signals };
        let given = !common.lr.is_empty();
        let mut lrs = if given { common.lr.clone() } else { lrs };
        while let Some(lr) = lrs.pop() {
            if let ControlFlow::Break(code) = search.try_rate(lr)? {
                return Ok(ControlFlow::Break(code));
            }
            if search.is_refused() {
                break;
            }
            if lrs.is_empty() && !given && search.tried() < most {
                lrs.extend(further(&search.losses()));
            }
        }
        Ok(ControlFlow::Continue(search))
    }

    /// Tries further learning rates next to the best one until there are `count`, so that no method has more tries than another.
    pub fn refine(&mut self, count: usize) -> anyhow::Result<Unstopped<()>> {
        while self.tried() < count && !self.trials.is_empty() {
            let Some(lr) = between(&self.losses()) else { break };
            if let ControlFlow::Break(code) = self.try_rate(lr)? {
                return Ok(ControlFlow::Break(code));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Repeats the best run with the seeds after the first one, `seeds` in all, and ends the search.
    pub fn finish(self, first_seed: u64, seeds: u64) -> anyhow::Result<Unstopped<Row>> {
        let tried = self.tried();
        let Self { name, command, trials, failures, out, console, signals } = self;
        let best = trials.into_iter().min_by(|a, b| a.loss.total_cmp(&b.loss));
        let best = match (best, failures.into_iter().next()) {
            (Some(best), _) => best,
            (None, failure) => {
                let none = Failure { reason: "no learning rate was given".into(), refused: true };
                let best = Err(failure.map_or(none, |(_, failure)| failure));
                return Ok(ControlFlow::Continue(Row { name, tried, best, losses: Vec::new() }));
            }
        };
        console.line(&format!("{name}: best {:.4} at {}", best.loss, best.lr));
        let mut losses = vec![best.loss];
        for seed in (first_seed..first_seed.saturating_add(seeds)).skip(1) {
            console.line(&format!("{name} at learning rate {} with seed {seed}", best.lr));
            let mut command = command.clone();
            command.extend(["--seed".into(), seed.to_string()]);
            let folder = out.join(format!("{name}-{}-seed-{seed}", best.lr));
            match trial(&command, best.lr, &folder, signals)? {
                ControlFlow::Break(code) => return Ok(ControlFlow::Break(code)),
                ControlFlow::Continue(Ok(trial)) => losses.push(trial.loss),
                ControlFlow::Continue(Err(Failure { reason, refused })) => {
                    let best = Err(Failure { reason: format!("seed {seed}: {reason}"), refused });
                    return Ok(ControlFlow::Continue(Row { name, tried, best, losses: Vec::new() }));
                }
            }
        }
        Ok(ControlFlow::Continue(Row { name, tried, best: Ok(best), losses }))
    }

    /// Number of learning rates that were tried.
    pub fn tried(&self) -> usize {
        self.trials.len() + self.failures.len()
    }

    /// Returns true if the settings were rejected: another learning rate would be rejected as well.
    fn is_refused(&self) -> bool {
        self.failures.last().is_some_and(|(_, failure)| failure.refused)
    }

    /// Losses by learning rate; infinite where the run failed.
    fn losses(&self) -> Vec<(f64, f64)> {
        let failed = self.failures.iter().map(|(lr, _)| (*lr, f64::INFINITY));
        self.trials.iter().map(|trial| (trial.lr, trial.loss)).chain(failed).collect()
    }

    fn try_rate(&mut self, lr: f64) -> anyhow::Result<Unstopped<()>> {
        let name = self.name;
        self.console.line(&format!("{name} at learning rate {lr}"));
        match trial(&self.command, lr, &self.out.join(format!("{name}-{lr:?}")), self.signals)? {
            ControlFlow::Break(code) => return Ok(ControlFlow::Break(code)),
            ControlFlow::Continue(Ok(trial)) => self.trials.push(trial),
            ControlFlow::Continue(Err(failure)) => {
                self.console.line(&format!("{name} at learning rate {lr}: {}", failure.reason));
                self.failures.push((lr, failure));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Next learning rate, if the best of these pairs of learning rate and loss is at an end.
fn further(tried: &[(f64, f64)]) -> Option<f64> {
    let (best, _) = tried.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
    let smallest = tried.iter().map(|(lr, _)| *lr).fold(f64::INFINITY, f64::min);
    let largest = tried.iter().map(|(lr, _)| *lr).fold(0.0, f64::max);
    match *best {
        best if best == smallest => rounded(smallest / 3.0),
        best if best == largest => rounded(largest * 3.0),
        _ => None,
    }
}

/// Untried learning rate between the best of these pairs of learning rate and loss and its better neighbour, by their logarithms.
fn between(tried: &[(f64, f64)]) -> Option<f64> {
    let (best, _) = *tried.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
    let below = tried.iter().filter(|(lr, _)| *lr < best).max_by(|a, b| a.0.total_cmp(&b.0));
    let above = tried.iter().filter(|(lr, _)| *lr > best).min_by(|a, b| a.0.total_cmp(&b.0));
    let mut neighbours: Vec<&(f64, f64)> = below.into_iter().chain(above).collect();
    neighbours.sort_by(|a, b| a.1.total_cmp(&b.1));
    let new = |lr: &f64| tried.iter().all(|(known, _)| known != lr);
    neighbours.into_iter().filter_map(|(lr, _)| rounded((lr * best).sqrt())).find(new)
}

/// Rounds a learning rate to three digits.
fn rounded(lr: f64) -> Option<f64> {
    format!("{lr:.2e}").parse().ok()
}

/// Learning rates from the usual one upward, spaced by this factor.
pub fn upward(usual: f64, factor: f64) -> Vec<f64> {
    [1.0, factor, factor * factor].into_iter().filter_map(|times| rounded(usual * times)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_best_rate_at_the_edge_asks_for_the_next() {
        assert_eq!(further(&[(0.001, 3.0), (0.003, 4.0), (0.01, 5.0)]), Some(0.000333));
        assert_eq!(further(&[(0.001, 5.0), (0.003, 4.0), (0.01, 3.0)]), Some(0.03));
        assert_eq!(further(&[(0.001, 5.0), (0.003, 3.0), (0.01, 4.0)]), None);
        assert_eq!(further(&[(0.003, 5.0), (0.01, f64::INFINITY), (0.03, f64::INFINITY)]), Some(0.001));
        assert_eq!(upward(2e-4, 5.0), [2e-4, 1e-3, 5e-3]);
    }

    #[test]
    fn more_rates_lie_between_the_best_and_its_better_neighbour() {
        assert_eq!(between(&[(0.001, 3.0), (0.01, 2.0), (0.1, 4.0)]), Some(0.00316));
        assert_eq!(between(&[(0.001, 3.0), (0.01, 2.0), (0.1, 2.5)]), Some(0.0316));
        assert_eq!(between(&[(0.01, 2.0), (0.1, f64::INFINITY)]), Some(0.0316));
        assert_eq!(between(&[(0.01, 2.0)]), None);
    }
}
