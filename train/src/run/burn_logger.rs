//! TensorBoard for Burn's own training loop.

use std::collections::HashMap;
use std::path::Path;

use burn::train::logger::MetricLogger;
use burn::train::metric::store::{EpochSummary, MetricsUpdate, Split};
use burn::train::metric::{MetricDefinition, MetricId, NumericEntry};

use super::TensorBoard;

/// Writes the numeric metrics of Burn's `SupervisedTraining` as TensorBoard scalars, `train/Loss`, `valid/Loss` and so on.
///
/// ```no_run
/// # use lowrank_train::run::TensorBoardLogger;
/// let logger = TensorBoardLogger::new("runs/mine/tensorboard")?;
/// // SupervisedTraining::new(..).with_metric_logger(logger)
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// The step of a scalar counts the updates of its split. A failure to write gives one warning and never stops the training.
pub struct TensorBoardLogger {
    board: TensorBoard,
    names: HashMap<MetricId, String>,
    steps: HashMap<String, u64>,
    values: HashMap<(String, String, usize), Vec<NumericEntry>>,
    failed: bool,
}

impl TensorBoardLogger {
    /// Opens a new event file in a folder.
    pub fn new(dir: impl AsRef<Path>) -> std::io::Result<Self> {
        Ok(Self {
            board: TensorBoard::create(dir.as_ref(), 0)?,
            names: HashMap::new(),
            steps: HashMap::new(),
            values: HashMap::new(),
            failed: false,
        })
    }

    fn warn(&mut self, written: std::io::Result<()>) {
        if let Err(error) = written
            && !std::mem::replace(&mut self.failed, true)
        {
            eprintln!(
                "warning: TensorBoard events cannot be written, training goes on without them: {error}"
            );
        }
    }
}

impl MetricLogger for TensorBoardLogger {
    fn log(&mut self, update: MetricsUpdate, epoch: usize, split: &Split) {
        let split = split.to_string();
        let step = self.steps.entry(split.clone()).or_default();
        *step += 1;
        let step = *step;
        for metric in update.entries_numeric {
            let (Some(name), Some(entry)) = (
                self.names.get(&metric.entry.metric_id).cloned(),
                metric.numeric_entry,
            ) else {
                continue;
            };
            let written = self
                .board
                .scalar(&format!("{split}/{name}"), step, entry.current());
            self.warn(written);
            self.values
                .entry((name, split.clone(), epoch))
                .or_default()
                .push(entry);
        }
        let flushed = self.board.flush();
        self.warn(flushed);
    }

    fn read_numeric(
        &mut self,
        name: &str,
        epoch: usize,
        split: &Split,
    ) -> Result<Vec<NumericEntry>, String> {
        let key = (name.to_string(), split.to_string(), epoch);
        Ok(self.values.get(&key).cloned().unwrap_or_default())
    }

    fn log_metric_definition(&mut self, definition: MetricDefinition) {
        self.names
            .insert(definition.metric_id, definition.name.to_string());
    }

    fn log_epoch_summary(&mut self, _summary: EpochSummary) {
        let flushed = self.board.flush();
        self.warn(flushed);
    }
}
