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
/// # use lowrank_train::run::report::TensorBoardLogger;
/// let logger = TensorBoardLogger::new("runs/mine/tensorboard")?;
/// // SupervisedTraining::new(..).with_metric_logger(logger)
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// The step of a scalar counts the updates of its split. A failure to write causes one warning and never stops the
/// training.
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
            eprintln!("warning: TensorBoard events cannot be written, training goes on without them: {error}");
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
            let (Some(name), Some(entry)) = (self.names.get(&metric.entry.metric_id).cloned(), metric.numeric_entry)
            else {
                continue;
            };
            let written = self.board.scalar(&format!("{split}/{name}"), step, entry.current());
            self.warn(written);
            self.values.entry((name, split.clone(), epoch)).or_default().push(entry);
        }
        let flushed = self.board.flush();
        self.warn(flushed);
    }

    fn read_numeric(&mut self, name: &str, epoch: usize, split: &Split) -> Result<Vec<NumericEntry>, String> {
        let key = (name.to_string(), split.to_string(), epoch);
        Ok(self.values.get(&key).cloned().unwrap_or_default())
    }

    fn log_metric_definition(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id, definition.name.to_string());
    }

    fn log_epoch_summary(&mut self, _summary: EpochSummary) {
        let flushed = self.board.flush();
        self.warn(flushed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::train::metric::store::NumericMetricUpdate;
    use burn::train::metric::{LossMetric, MetricEntry, SerializedEntry};

    #[test]
    fn updates_are_counted_by_split_and_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut logger = TensorBoardLogger::new(dir.path()).unwrap();
        let id = MetricId::new("loss".to_string().into());
        logger.log_metric_definition(MetricDefinition::new(id.clone(), &LossMetric::new()));
        let update = |value: f64| {
            let entry = MetricEntry::new(id.clone(), SerializedEntry::not_available(None));
            let numeric = Some(NumericEntry::Value(value));
            MetricsUpdate {
                entries: vec![],
                entries_numeric: vec![NumericMetricUpdate {
                    entry,
                    numeric_entry: numeric.clone(),
                    running_entry: numeric,
                }],
            }
        };
        for (value, epoch, split) in
            [(3.0, 1, Split::Train), (2.0, 1, Split::Train), (2.5, 1, Split::Valid), (1.0, 2, Split::Train)]
        {
            logger.log(update(value), epoch, &split);
        }
        let mut read = |epoch, split| {
            let values = logger.read_numeric("Loss", epoch, &split).unwrap();
            values.iter().map(NumericEntry::current).collect::<Vec<_>>()
        };
        assert_eq!(read(1, Split::Train), [3.0, 2.0]);
        assert_eq!(read(2, Split::Train), [1.0]);
        assert_eq!(read(1, Split::Valid), [2.5]);
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let bytes = std::fs::read(file).unwrap();
        for tag in ["train/Loss", "valid/Loss"] {
            assert!(bytes.windows(tag.len()).any(|window| window == tag.as_bytes()), "{tag}");
        }
    }
}
