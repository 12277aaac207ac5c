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
}

/// Trains with every learning rate, and with further ones while the best is at an end. Stops with the exit code of a
/// run that a signal stopped.
pub fn search(
    contender: Contender,
    common: &Common,
    most: usize,
    out: &Path,
    console: &Console,
    signals: &Signals,
) -> anyhow::Result<ControlFlow<ExitCode, Row>> {
    let Contender { name, lrs, mut command } = contender;
    command.extend(common.set.iter().flat_map(|setting| ["--set".to_string(), setting.clone()]));
    let given = !common.lr.is_empty();
    let mut lrs = if given { common.lr.clone() } else { lrs };
    let (mut trials, mut failures) = (Vec::new(), Vec::new());
    while let Some(lr) = lrs.pop() {
        console.line(&format!("{name} at learning rate {lr}"));
        match trial(&command, lr, &out.join(format!("{name}-{lr}")), signals)? {
            ControlFlow::Break(code) => return Ok(ControlFlow::Break(code)),
            ControlFlow::Continue(Ok(trial)) => trials.push(trial),
            ControlFlow::Continue(Err(failure)) => {
                console.line(&format!("{name} at learning rate {lr}: {}", failure.reason));
                let refused = failure.refused;
                failures.push((lr, failure));
                // Another learning rate would be rejected as well.
                if refused {
                    break;
                }
            }
        }
        if lrs.is_empty() && !given && trials.len() + failures.len() < most {
            let failed = failures.iter().map(|(lr, _)| (*lr, f64::INFINITY));
            let tried: Vec<(f64, f64)> = trials.iter().map(|trial| (trial.lr, trial.loss)).chain(failed).collect();
            lrs.extend(further(&tried));
        }
    }
    let tried = trials.len() + failures.len();
    let best = trials.into_iter().min_by(|a, b| a.loss.total_cmp(&b.loss));
    let best = match (best, failures.into_iter().next()) {
        (Some(best), _) => Ok(best),
        (None, Some((_, failure))) => Err(failure),
        (None, None) => Err(Failure { reason: "no learning rate was given".into(), refused: true }),
    };
    if let Ok(best) = &best {
        console.line(&format!("{name}: best {:.4} at {}", best.loss, best.lr));
    }
    Ok(ControlFlow::Continue(Row { name, tried, best }))
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
}
