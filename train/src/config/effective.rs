//! The whole configuration of a run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::Job;
use super::sections::{
    AdapterSection, AllocationSection, CheckpointSection, DataSection, EvalSection, LogSection, ModelSection,
    OptimizerSection, PenaltySection, RuleSection, RunSection, ScheduleSection, TokenizerSection, TrainSection,
    WeightsSection,
};
use crate::process::Peers;

/// Whole configuration of a run; the keys are documented in their sections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // each section is documented where it is declared
pub struct Config {
    pub run: RunSection,
    pub model: ModelSection,
    pub weights: WeightsSection,
    pub adapter: AdapterSection,
    pub rule: RuleSection,
    pub allocation: AllocationSection,
    pub penalty: PenaltySection,
    pub data: DataSection,
    pub tokenizer: TokenizerSection,
    pub optimizer: OptimizerSection,
    pub schedule: ScheduleSection,
    pub train: TrainSection,
    pub eval: EvalSection,
    pub checkpoint: CheckpointSection,
    pub log: LogSection,
}

impl Config {
    /// Defaults of a job.
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

    /// Formats the whole effective configuration as a file.
    pub fn to_toml(&self) -> String {
        self.table().to_string()
    }

    /// All sections, without the keys that are not supported in this job.
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
        prune(&mut table);
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

    /// Entries that determine the result: a run can be resumed only with the same ones.
    ///
    /// Output paths, logging, the device and the number of threads are not among them; the end of the run is only
    /// included if the schedule depends on it.
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
            "train.shard_state",
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

    /// Returns true if steps, tokens or epochs limit the run.
    pub fn has_steps(&self) -> bool {
        self.train.steps > 0 || self.train.tokens > 0 || self.train.epochs > 0.0
    }

    /// Number of warm-up steps in a run of `total_steps`.
    pub fn warmup_steps(&self, total_steps: Option<u64>) -> u64 {
        match (self.schedule.warmup_steps, total_steps) {
            (0, Some(total)) => (self.schedule.warmup_fraction * total as f64).ceil() as u64,
            (steps, _) => steps,
        }
    }

    /// Steps of the whole run with `rows` rows in an epoch, if steps, tokens or epochs limit it.
    pub fn total_steps(&self, rows: u64) -> Option<u64> {
        // The ranges of the three keep their product far below 2^64.
        let a_step = (self.train.batch * self.train.accumulation * Peers::of_process().size()) as u64;
        let by_tokens = (self.train.tokens > 0).then(|| self.train.tokens.div_ceil(a_step * self.train.seq_len as u64));
        let by_epochs =
            (self.train.epochs > 0.0).then(|| ((self.train.epochs * rows as f64 / a_step as f64).ceil() as u64).max(1));
        let by_steps = (self.train.steps > 0).then_some(self.train.steps);
        by_steps.into_iter().chain(by_tokens).chain(by_epochs).min()
    }
}

/// Removes tables without a value.
fn prune(table: &mut Table) {
    for (_, value) in table.iter_mut() {
        if let Value::Table(below) = value {
            prune(below);
        }
    }
    table.retain(|_, value| value.as_table().is_none_or(|below| !below.is_empty()));
}
