//! The sections and their defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use lowrank_models::adapter::Scaling;

use crate::data::Format;
use crate::engine::{BackwardMode, ScheduleKind};

/// Everything that a run can be told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // the help of each key stands in `KEYS`
pub struct Config {
    pub run: RunSection,
    pub model: ModelSection,
    pub adapter: AdapterSection,
    pub rule: RuleSection,
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

/// What a run does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Job {
    /// A model learns from text.
    #[default]
    Pretrain,
    /// A model that exists learns from examples, by an adapter or whole.
    Finetune,
}

impl Job {
    /// Name of the command.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pretrain => "pretrain",
            Self::Finetune => "finetune",
        }
    }

    /// Whether a key has a meaning in such a run.
    pub fn knows(self, key: &str) -> bool {
        let others: &[&str] = match self {
            Self::Pretrain => &["adapter.", "rule.", "data.learn_prompt", "data.packing"],
            Self::Finetune => &["model.", "tokenizer.", "data.cache", "data.verify", "train.tokens"],
        };
        key == "model.name" || !others.iter().any(|start| key.starts_with(start))
    }
}

section! {
    /// What the run does and where it is written.
    RunSection {
        job: Job = Job::Pretrain,
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
    /// The adapter of a fine-tuning.
    AdapterSection {
        name: String = "lora".into(),
        rank: Option<usize> = None,
        alpha: Option<f64> = None,
        scaling: Option<Scaling> = None,
        dropout: f64 = 0.0,
        init: String = "default".into(),
        init_samples: usize = 50,
        targets: String = "all-linear".into(),
        exclude: String = String::new(),
        layers: Vec<usize> = Vec::new(),
        rank_pattern: Vec<String> = Vec::new(),
        alpha_pattern: Vec<String> = Vec::new(),
        options: Table = Table::new(),
    }
}

section! {
    /// How the adapter is trained.
    RuleSection {
        name: String = "plain".into(),
        options: Table = Table::new(),
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
        learn_prompt: bool = false,
        packing: bool = false,
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
        warmup_fraction: f64 = 0.0,
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
        epochs: f64 = 0.0,
        minutes: f64 = 10.0,
        batch: usize = 4,
        seq_len: usize = 256,
        accumulation: usize = 1,
        backward: BackwardMode = BackwardMode::Whole,
        memory: String = String::new(),
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
    /// The defaults of a job.
    pub fn of(job: Job) -> Self {
        let config = Self { run: RunSection { job, ..RunSection::default() }, ..Self::default() };
        match job {
            Job::Pretrain => config,
            Job::Finetune => Self {
                optimizer: OptimizerSection { lr: 2e-4, weight_decay: 0.0, ..config.optimizer },
                schedule: ScheduleSection {
                    warmup_steps: 0,
                    warmup_fraction: 0.03,
                    final_fraction: 0.0,
                    ..config.schedule
                },
                train: TrainSection { steps: 0, epochs: 3.0, minutes: 0.0, ..config.train },
                eval: EvalSection { every: 100, ..config.eval },
                checkpoint: CheckpointSection { every: 100, ..config.checkpoint },
                log: LogSection { sample_tokens: 60, sample_prompt: String::new(), ..config.log },
                ..config
            },
        }
    }

    /// The whole effective configuration as a file.
    pub fn to_toml(&self) -> String {
        self.table().to_string()
    }

    /// All sections, without the keys that have no meaning in this job.
    pub(super) fn table(&self) -> Table {
        let mut table = match Value::try_from(self) {
            Ok(Value::Table(table)) => table,
            other => unreachable!("a struct of sections is a table: {other:?}"),
        };
        for (section, values) in &mut table {
            if let Value::Table(values) = values {
                values.retain(|key, _| self.run.job.knows(&format!("{section}.{key}")));
            }
        }
        table.retain(|_, values| values.as_table().is_none_or(|values| !values.is_empty()));
        table
    }

    /// Every key with a value, as `section.key` and TOML text.
    pub fn entries(&self) -> BTreeMap<String, String> {
        fn add(entries: &mut BTreeMap<String, String>, name: &str, value: &Value) {
            match value {
                Value::Table(values) => {
                    values.iter().for_each(|(key, value)| add(entries, &format!("{name}.{key}"), value))
                }
                value => drop(entries.insert(name.to_string(), value.to_string())),
            }
        }
        let mut entries = BTreeMap::new();
        for (section, values) in &self.table() {
            add(&mut entries, section, values);
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
            "train.memory",
            "train.minutes",
            "data.cache",
            "data.verify",
        ];
        entries.retain(|key, _| !free.iter().any(|start| key.starts_with(start)));
        if !self.schedule.kind.needs_total() {
            entries.remove("train.steps");
            entries.remove("train.tokens");
            entries.remove("train.epochs");
        }
        entries
    }

    /// Whether steps, tokens or epochs limit the run.
    pub fn has_steps(&self) -> bool {
        self.train.steps > 0 || self.train.tokens > 0 || self.train.epochs > 0.0
    }

    /// Steps of the whole run with so many rows in an epoch, where steps, tokens or epochs limit it.
    pub fn total_steps(&self, rows: u64) -> Option<u64> {
        let a_step = (self.train.batch * self.train.accumulation) as u64;
        let by_tokens = (self.train.tokens > 0).then(|| self.train.tokens.div_ceil(a_step * self.train.seq_len as u64));
        let by_epochs =
            (self.train.epochs > 0.0).then(|| ((self.train.epochs * rows as f64 / a_step as f64).ceil() as u64).max(1));
        let by_steps = (self.train.steps > 0).then_some(self.train.steps);
        by_steps.into_iter().chain(by_tokens).chain(by_epochs).min()
    }
}
