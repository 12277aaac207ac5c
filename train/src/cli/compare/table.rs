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

/// Formats the table in Markdown; a failed method shows the reason in place of its loss.
pub fn markdown(what: &str, rows: &[Row], columns: &[Column<'_>]) -> String {
    let titles: Vec<&str> = columns.iter().map(|column| column.title).collect();
    let mut text = format!("| {what} | validation loss | learning rate (tried) | {} |\n", titles.join(" | "));
    text.push_str(&format!("|{}\n", "---|".repeat(3 + columns.len())));
    for Row { name, tried, best } in rows {
        let cells = match best {
            Ok(best) => [format!("{:.4}", best.loss), format!("{} ({tried})", best.lr)]
                .into_iter()
                .chain(columns.iter().map(|column| (column.cell)(best, rows)))
                .collect(),
            Err(failure) => {
                let mut cells = vec![String::new(); 2 + columns.len()];
                cells[0] = failure.reason.replace('\n', " ").replace('|', "\\|");
                cells
            }
        };
        text.push_str(&format!("| `{name}` | {} |\n", cells.join(" | ")));
    }
    text
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
