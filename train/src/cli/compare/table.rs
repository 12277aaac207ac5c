//! The table of a comparison.

use super::search::Row;
use super::trial::Trial;
use crate::build::BuildError;
use crate::config::bytes;

/// A column beyond name, loss and learning rate.
pub struct Column<'a> {
    pub title: &'static str,
    /// Cell of the column, from a run and all rows.
    pub cell: &'a dyn Fn(&Trial, &[Row]) -> String,
}

/// Formats the table in Markdown; a failed method shows the reason in place of its loss. With several seeds the loss is the mean with the standard
/// deviation, and a z-score compares it with that of the first row.
pub fn markdown(what: &str, rows: &[Row], columns: &[Column<'_>]) -> String {
    let first = rows.first().filter(|_| rows.iter().any(|row| row.losses.len() > 1));
    let mut titles = vec![what.to_string(), "validation loss".into(), "learning rate (tried)".into()];
    titles.extend(first.map(|first| format!("z against `{}`", first.name)));
    titles.extend(columns.iter().map(|column| column.title.to_string()));
    let mut text = format!("| {} |\n|{}\n", titles.join(" | "), "---|".repeat(titles.len()));
    for row in rows {
        let mut cells = vec![format!("`{}`", row.name)];
        match &row.best {
            Ok(best) => {
                cells.extend([loss(&row.losses), format!("{} ({})", best.lr, row.tried)]);
                cells.extend(first.map(|first| z(&row.losses, &first.losses).unwrap_or_default()));
                cells.extend(columns.iter().map(|column| (column.cell)(best, rows)));
            }
            Err(failure) => {
                cells.push(failure.reason.replace('\n', " ").replace('|', "\\|"));
                cells.resize(titles.len(), String::new());
            }
        }
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    text
}

/// Mean and standard deviation of a sample; no deviation of a single value.
fn moments(values: &[f64]) -> (f64, Option<f64>) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    (mean, (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt()))
}

fn loss(losses: &[f64]) -> String {
    match moments(losses) {
        (mean, Some(deviation)) => format!("{mean:.4} ± {deviation:.4}"),
        (mean, None) => format!("{mean:.4}"),
    }
}

/// Difference of the means in units of its standard error; none without spread. Beyond 1.96 in either direction chance alone explains it in one of twenty
/// comparisons.
fn z(losses: &[f64], first: &[f64]) -> Option<String> {
    let ((mean, Some(deviation)), (of_first, Some(other))) = (moments(losses), moments(first)) else { return None };
    let error = (deviation.powi(2) / losses.len() as f64 + other.powi(2) / first.len() as f64).sqrt();
    (error > 0.0).then(|| format!("{:+.2}", (mean - of_first) / error))
}

/// Error to report if there is no result at all.
pub fn all_failed(rows: &[Row]) -> Option<anyhow::Error> {
    let failures: Vec<_> = rows.iter().map(|row| row.best.as_ref().err().map(|failure| (row.name, failure))).collect();
    let failures = failures.into_iter().collect::<Option<Vec<_>>>()?;
    let reasons: Vec<String> = failures.iter().map(|(name, failure)| format!("{name}: {}", failure.reason)).collect();
    let text = format!("every run failed:\n{}", reasons.join("\n"));
    Some(match failures.iter().all(|(_, failure)| failure.refused) {
        true => BuildError::Settings(text).into(),
        false => anyhow::Error::msg(text),
    })
}

/// Column with the mean time of a step.
pub const STEP: Column<'static> = Column {
    title: "step",
    cell: &|trial, _| {
        let summary = &trial.summary;
        let tokens = summary.tokens as f64 / summary.steps as f64;
        format!("{:.0} ms", 1e3 * tokens / summary.tokens_per_second)
    },
};

/// Column with the bytes of the optimizer's state.
pub const STATE: Column<'static> =
    Column { title: "optimizer state", cell: &|trial, _| bytes(trial.summary.optimizer_state_bytes) };

/// Column with the peak memory of the process.
pub const PEAK: Column<'static> =
    Column { title: "peak memory", cell: &|trial, _| bytes(trial.summary.peak_rss_bytes) };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_and_differences_follow_from_the_seeds() {
        assert_eq!(loss(&[2.5]), "2.5000");
        assert_eq!(loss(&[1.0, 2.0, 3.0]), "2.0000 ± 1.0000");
        assert_eq!(z(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]).unwrap(), "+0.00");
        // (5 - 2) / sqrt(1 / 3 + 1 / 3)
        assert_eq!(z(&[4.0, 5.0, 6.0], &[1.0, 2.0, 3.0]).unwrap(), "+3.67");
        assert_eq!((z(&[2.0], &[1.0]), z(&[2.0, 2.0], &[1.0, 1.0])), (None, None));
    }
}
