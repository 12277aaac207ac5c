//! The sections and their defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::data::Format;
use crate::engine::{BackwardMode, ScheduleKind};

/// Everything that a run can be told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // the help of each key stands in `KEYS`
pub struct Config {
    pub run: RunSection,
    pub model: ModelSection,
    pub data: DataSection,
    pub tokenizer: TokenizerSection,
    pub optimizer: OptimizerSection,
    pub schedule: ScheduleSection,
    pub train: TrainSection,
    pub eval: EvalSection,
    pub checkpoint: CheckpointSection,
    pub log: LogSection,
}

macro_rules! section {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $kind:ty = $default:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        #[allow(missing_docs)] // the help of each key stands in `KEYS`
        pub struct $name { $($(#[$field_meta])* pub $field: $kind,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

section! {
    /// Where the run is written.
    RunSection {
        out: PathBuf = PathBuf::new(),
    }
}

section! {
    /// The model's shape.
    ModelSection {
        name: String = String::new(),
        parameterization: String = "dense".into(),
        rank: Option<usize> = None,
        alpha: Option<f64> = None,
        density: Option<f64> = None,
        trained_scale: Option<bool> = None,
        init: Option<String> = None,
        gamma: Option<f64> = None,
        keep_gate: Option<bool> = None,
        reset_every: Option<u64> = None,
        restart_warmup: Option<u64> = None,
        reset: Option<String> = None,
        exact_every: Option<u64> = None,
        lr_scaler: Option<f64> = None,
        hidden_size: Option<usize> = None,
        intermediate_size: Option<usize> = None,
        num_hidden_layers: Option<usize> = None,
        num_attention_heads: Option<usize> = None,
        num_key_value_heads: Option<usize> = None,
        head_dim: Option<usize> = None,
        max_position_embeddings: Option<usize> = None,
        rope_theta: Option<f64> = None,
        rms_norm_eps: Option<f64> = None,
        tie_word_embeddings: Option<bool> = None,
    }
}

section! {
    /// The text.
    DataSection {
        path: Vec<PathBuf> = Vec::new(),
        format: Format = Format::Auto,
        field: String = "text".into(),
        validation_fraction: f64 = 0.05,
        document_mask: bool = true,
        verify: bool = true,
        cache: PathBuf = PathBuf::from("runs/cache"),
    }
}

section! {
    /// From text to tokens.
    TokenizerSection {
        path: String = String::new(),
        vocab_size: usize = 4096,
    }
}

section! {
    /// The optimizer.
    OptimizerSection {
        name: String = "adamw".into(),
        lr: f64 = 3e-3,
        weight_decay: f64 = 0.1,
        clip: f64 = 1.0,
        block_clip: f64 = 0.0,
        include: String = String::new(),
        exclude: String = String::new(),
        #[serde(flatten)]
        options: BTreeMap<String, Value> = BTreeMap::new(),
    }
}

section! {
    /// The learning rate over time.
    ScheduleSection {
        kind: ScheduleKind = ScheduleKind::Cosine,
        warmup_steps: u64 = 100,
        final_fraction: f64 = 0.1,
        decay_fraction: f64 = 0.2,
        adjust_steps: u64 = 0,
    }
}

section! {
    /// Steps and batches.
    TrainSection {
        steps: u64 = 1800,
        tokens: u64 = 0,
        minutes: f64 = 10.0,
        batch: usize = 4,
        seq_len: usize = 256,
        accumulation: usize = 1,
        backward: BackwardMode = BackwardMode::Whole,
        seed: u64 = 42,
        device: String = "cpu".into(),
        threads: usize = 0,
        max_skipped_steps: u64 = 0,
    }
}

section! {
    /// Loss on held-out text.
    EvalSection {
        every: u64 = 300,
        batches: usize = 20,
    }
}

section! {
    /// Saving.
    CheckpointSection {
        every: u64 = 300,
        keep_last: usize = 2,
        keep_best: bool = true,
    }
}

section! {
    /// What is written while training.
    LogSection {
        every: u64 = 1,
        tensorboard: bool = true,
        histograms_every: u64 = 0,
        sample_every: u64 = 0,
        sample_tokens: usize = 120,
        sample_prompt: String = "//! ".into(),
    }
}

impl Config {
    /// The whole effective configuration as a file.
    pub fn to_toml(&self) -> String {
        self.table().to_string()
    }

    pub(super) fn table(&self) -> Table {
        match Value::try_from(self) {
            Ok(Value::Table(table)) => table,
            other => unreachable!("a struct of sections is a table: {other:?}"),
        }
    }

    /// Every key with a value, as `section.key` and TOML text.
    pub fn entries(&self) -> BTreeMap<String, String> {
        let mut entries = BTreeMap::new();
        for (section, values) in self.table() {
            for (key, value) in values.as_table().into_iter().flatten() {
                entries.insert(format!("{section}.{key}"), value.to_string());
            }
        }
        entries
    }

    /// The entries that decide the result: a run can be resumed only with the same ones.
    ///
    /// Where things are written, what is logged and how often, the device and the number of threads are not among them; when the run
    /// ends is only where the schedule depends on it.
    pub fn deciding_entries(&self) -> BTreeMap<String, String> {
        let mut entries = self.entries();
        let free = [
            "run.",
            "eval.",
            "checkpoint.",
            "log.",
            "train.device",
            "train.threads",
            "train.max_skipped_steps",
            "train.minutes",
            "data.cache",
            "data.verify",
        ];
        entries.retain(|key, _| !free.iter().any(|start| key.starts_with(start)));
        if !self.schedule.kind.needs_total() {
            entries.remove("train.steps");
            entries.remove("train.tokens");
        }
        entries
    }

    /// Steps of the whole run, where steps or tokens limit it.
    pub fn total_steps(&self) -> Option<u64> {
        let per_step = (self.train.batch * self.train.seq_len * self.train.accumulation) as u64;
        let by_tokens = (self.train.tokens > 0).then(|| self.train.tokens.div_ceil(per_step.max(1)));
        let by_steps = (self.train.steps > 0).then_some(self.train.steps);
        by_steps.into_iter().chain(by_tokens).min()
    }
}
