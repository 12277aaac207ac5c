//! `metrics.jsonl`: one object per logged step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use lowrank_models::adapter::LayerAllocation;
use serde::Serialize;

use crate::process::files::write_whole;

/// Allocation of the layers by path.
pub type Layers = BTreeMap<String, LayerAllocation>;

/// Metrics of a step. Values that were not measured at that step are left out of the line.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// Step, counted from 1.
    pub step: u64,
    /// Number of tokens so far that were not ignored.
    pub tokens: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Training loss in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Global norm of the gradient before clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Tokens per second in this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Seconds of the step spent reading its samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_seconds: Option<f64>,
    /// Bytes that the first process sent in the step to sum gradients and to share updated weights; of a run of one process there
    /// are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// Seconds of the step in this, waiting for other processes included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub communication_seconds: Option<f64>,
    /// Resident memory of the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_bytes: Option<u64>,
    /// Largest resident memory so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Bytes of weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_bytes: Option<u64>,
    /// Bytes of gradients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_bytes: Option<u64>,
    /// Bytes that the forward pass kept for the backward pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation_bytes: Option<u64>,
    /// Bytes of the device's memory pool that are in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
    /// Bytes that the device's memory pool has reserved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_reserved_bytes: Option<u64>,
    /// Bytes of the optimizer's state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_bytes: Option<u64>,
    /// Validation loss in nats per token, on the batches of `eval.batches`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Validation loss on all held-out text, at the end of a run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_validation_loss: Option<f64>,
    /// Fraction of the held-out rows that are classified correctly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Ranks by layer, where an allocation has changed them since the last line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// True if the step was skipped because of a non-finite value.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

impl Metrics {
    /// TensorBoard tags with the measured values.
    pub fn scalars(&self) -> Vec<(&'static str, f64)> {
        let bytes = |value: Option<u64>| value.map(|bytes| bytes as f64);
        [
            ("train/loss", self.loss),
            ("train/perplexity", self.loss.map(f64::exp)),
            ("train/learning_rate", self.lr),
            ("train/grad_norm", self.grad_norm),
            ("validation/loss", self.validation_loss),
            ("validation/perplexity", self.validation_loss.map(f64::exp)),
            ("validation/final_loss", self.final_validation_loss),
            ("validation/accuracy", self.accuracy),
            ("speed/tokens_per_second", self.tokens_per_second),
            ("speed/data_seconds", self.data_seconds),
            ("speed/sent_bytes", bytes(self.sent_bytes)),
            ("speed/communication_seconds", self.communication_seconds),
            ("memory/rss_bytes", bytes(self.rss_bytes)),
            ("memory/peak_rss_bytes", bytes(self.peak_rss_bytes)),
            ("memory/weight_bytes", bytes(self.weight_bytes)),
            ("memory/gradient_bytes", bytes(self.gradient_bytes)),
            ("memory/activation_bytes", bytes(self.activation_bytes)),
            ("memory/optimizer_state_bytes", bytes(self.state_bytes)),
            ("memory/device_bytes", bytes(self.device_bytes)),
            ("memory/device_reserved_bytes", bytes(self.device_reserved_bytes)),
        ]
        .into_iter()
        .filter_map(|(tag, value)| Some((tag, value?)))
        .collect()
    }

    /// TensorBoard tags of the layers' figures.
    pub fn layer_scalars(&self) -> Vec<(String, f64)> {
        let layers = self.layers.iter().flatten();
        let of_layer = |(path, layer): (&String, &LayerAllocation)| {
            let rank = (format!("rank/{path}"), layer.rank as f64);
            let figures = layer.figures.iter().map(|(name, value)| (format!("{name}/{path}"), *value));
            std::iter::once(rank).chain(figures).collect::<Vec<_>>()
        };
        layers.flat_map(of_layer).collect()
    }
}

/// Appends to `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsFile {
    file: File,
}

impl MetricsFile {
    /// Opens the file of a run that continues after `step`: lines of later steps, and lines that are not metrics, are
    /// removed, so that no step is logged twice. A damaged line affects no other.
    pub fn open(path: &Path, step: u64) -> std::io::Result<Self> {
        if let Some(bytes) = read_if_there(path)? {
            let kept: Vec<&[u8]> = bytes
                .split_inclusive(|byte| *byte == b'\n')
                .filter(|line| line.ends_with(b"\n") && step_of(line).is_some_and(|logged| logged <= step))
                .collect();
            let kept = kept.concat();
            if kept != bytes {
                write_whole(path, &kept)?;
            }
        }
        Ok(Self { file: File::options().append(true).create(true).open(path)? })
    }

    /// Appends a line.
    pub fn write(&mut self, metrics: &Metrics) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(metrics)?;
        line.push(b'\n');
        self.file.write_all(&line)
    }
}

fn read_if_there(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<serde_json::Value>(line).ok()?.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_on_drops_later_and_broken_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, 0).unwrap();
        for step in 1..=5 {
            file.write(&Metrics { step, loss: Some(1.0 / step as f64), ..Metrics::default() }).unwrap();
        }
        drop(file);
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 6, \"lo").unwrap();
        MetricsFile::open(&path, 9).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 5);
        MetricsFile::open(&path, 3).unwrap().write(&Metrics { step: 4, ..Metrics::default() }).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> = text.lines().filter_map(|line| step_of(line.as_bytes())).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert!(!text.lines().last().unwrap().contains("loss"));
    }

    #[test]
    fn a_damaged_line_costs_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let lines: [&[u8]; 4] = [b"{\"step\":1}\n", b"{\"step\":2, \xff\n", b"{\"step\":3}\n", b"{\"step\":4}\n"];
        std::fs::write(&path, lines.concat()).unwrap();
        MetricsFile::open(&path, 3).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":3}\n");
    }
}
