//! Defaults, file, `--set` and flags, laid over one another.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use lowrank_models::adapter::{RULES, StructureEntry};
use lowrank_models::linear::PARAMETERIZATIONS;
use lowrank_optim::registry;
use serde::Deserialize;
use toml::{Table, Value};

use super::{Config, Job, KEYS, Kind};
use crate::engine::BackwardMode;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The defaults.
    Default,
    /// A line of a file.
    File(PathBuf, usize),
    /// `--set`.
    Set,
    /// A flag of its own.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{} line {line}", path.display()),
            Self::Set => f.write_str("--set"),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// A key given a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// `section.key`.
    pub key: String,
    /// The value.
    pub value: Value,
    /// Where it came from.
    pub origin: Origin,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{path}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's message with the line.
        message: String,
    },
    /// `--set` without an equals sign.
    #[error("--set {0}: write it as section.key=value")]
    Assignment(String),
    /// A key that does not exist.
    #[error("{origin}: there is no key {key}{}", nearest.as_ref().map(|n| format!("; did you mean {n}?")).unwrap_or_default())]
    Unknown {
        /// The key.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// The most similar key.
        nearest: Option<String>,
    },
    /// A key of another command.
    #[error("{key} ({origin}) has no meaning in `lowrank {}`; take it away", job.name())]
    Elsewhere {
        /// The key.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// What the run does.
        job: Job,
    },
    /// A value that the key does not take.
    #[error("{key} = {value} ({origin}): {reason}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// Where it came from.
        origin: Origin,
        /// What is allowed.
        reason: String,
    },
}

/// Layers of assignments; later ones win.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    assignments: Vec<Assignment>,
}

impl Layers {
    /// Adds all keys of a file.
    pub fn file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        let syntax = |message: String| ConfigError::Syntax { path: path.to_path_buf(), message };
        let table: Table = toml::from_str(&text).map_err(|error| syntax(error.to_string()))?;
        for (section, values) in table {
            let origin = |key: &str| Origin::File(path.to_path_buf(), line_of(&text, &section, key));
            let Value::Table(values) = values else {
                return Err(unknown(&section, origin(""), &[]));
            };
            for (key, value) in values {
                let origin = origin(&key);
                let name = format!("{section}.{key}");
                match value {
                    // A table of options in its section.
                    Value::Table(options) if key == OPTIONS => {
                        for (option, value) in options {
                            let origin = Origin::File(path.to_path_buf(), line_of(&text, &name, &option));
                            self.assignments.push(Assignment { key: format!("{name}.{option}"), value, origin });
                        }
                    }
                    value => self.assignments.push(Assignment { key: name, value, origin }),
                }
            }
        }
        Ok(())
    }

    /// Adds `section.key=value`; a value that is no TOML counts as text.
    pub fn set(&mut self, text: &str) -> Result<(), ConfigError> {
        let (key, value) = text.split_once('=').ok_or_else(|| ConfigError::Assignment(text.to_string()))?;
        let value = toml::from_str::<Table>(&format!("value = {}", value.trim()))
            .ok()
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| Value::String(value.trim().to_string()));
        self.assignments.push(Assignment { key: key.trim().to_string(), value, origin: Origin::Set });
        Ok(())
    }

    /// Adds the value of a flag.
    pub fn flag(&mut self, flag: &'static str, key: &str, value: impl Into<Value>) {
        self.assignments.push(Assignment { key: key.to_string(), value: value.into(), origin: Origin::Flag(flag) });
    }

    /// Adds the value of a flag that is given.
    pub fn optional(&mut self, flag: &'static str, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.flag(flag, key, value);
        }
    }

    /// Whether any layer gives the key a value.
    pub fn has(&self, key: &str) -> bool {
        self.assignments.iter().any(|assignment| assignment.key == key)
    }

    /// The configuration of all layers over `base`, checked.
    pub fn resolve(&self, base: &Config) -> Result<Config, ConfigError> {
        let other = self.assignments.iter().find(|given| given.key == "run.job");
        if let Some(other) = other.filter(|given| given.value.as_str() != Some(base.run.job.name())) {
            return Err(ConfigError::Value {
                key: other.key.clone(),
                value: other.value.to_string(),
                origin: other.origin.clone(),
                reason: match other.value.as_str() {
                    Some(job) => format!("this is `lowrank {}`; use `lowrank {job}`", base.run.job.name()),
                    None => "it must be a text".into(),
                },
            });
        }
        let mut table = base.table();
        let mut origins = BTreeMap::new();
        let own = self.own_keys(base, &mut table);
        if let Some(name) = self.text("model.parameterization")
            && name != base.model.parameterization
            && PARAMETERIZATIONS.iter().any(|method| method.name == name && method.restarts)
            && let Some(Value::Table(section)) = table.get_mut("schedule")
        {
            // The schedule that its paper has; one that is asked for stands.
            section.insert("kind".into(), Value::String("cosine-restarts".into()));
        }
        for assignment in &self.assignments {
            let value = checked(assignment, &own)?;
            if !base.run.job.knows(&assignment.key) {
                return Err(ConfigError::Elsewhere {
                    key: assignment.key.clone(),
                    origin: assignment.origin.clone(),
                    job: base.run.job,
                });
            }
            let mut names: Vec<&str> = assignment.key.split('.').collect();
            let key = names.pop().unwrap_or_default();
            let mut section = &mut table;
            for name in names {
                let entry = section.entry(name).or_insert_with(|| Value::Table(Table::new()));
                let Value::Table(below) = entry else {
                    return Err(unknown(&assignment.key, assignment.origin.clone(), &own));
                };
                section = below;
            }
            section.insert(key.to_string(), value);
            origins.insert(assignment.key.as_str(), assignment);
        }
        let origin_of = |key: &str| origins.get(key).map_or(Origin::Default, |assignment| assignment.origin.clone());
        // One section at a time, so that the message can name the key.
        let mut config = Config::default();
        macro_rules! read {
            ($($section:ident),*) => {$(
                let values = table.remove(stringify!($section)).unwrap_or_else(|| Value::Table(Table::new()));
                config.$section = Deserialize::deserialize(values.clone()).map_err(|error| {
                    section_error(stringify!($section), &values, &error.to_string(), &origin_of)
                })?;
            )*};
        }
        read!(run, model, adapter, rule, data, tokenizer, optimizer, schedule, train, eval, checkpoint, log);
        check(&config, &origin_of)?;
        Ok(config)
    }

    /// The last text that a key is given.
    fn text(&self, key: &str) -> Option<&str> {
        self.assignments.iter().rev().find(|assignment| assignment.key == key)?.value.as_str()
    }

    /// Keys of the options that the chosen optimizer, structure and rule have of their own. Options of others are taken out of the table, since
    /// they would be unknown.
    fn own_keys(&self, base: &Config, table: &mut Table) -> Vec<String> {
        let optimizer = self.text("optimizer.name").unwrap_or(&base.optimizer.name);
        let structure = self.text("adapter.name").unwrap_or(&base.adapter.name);
        let rule = self.text("rule.name").unwrap_or(&base.rule.name);
        for (name, now, before) in [
            ("optimizer", optimizer, &base.optimizer.name),
            ("adapter", structure, &base.adapter.name),
            ("rule", rule, &base.rule.name),
        ] {
            if let Some(Value::Table(section)) = table.get_mut(name).filter(|_| now != before) {
                section.retain(|key, _| KEYS.iter().any(|known| known.name == format!("{name}.{key}")));
            }
        }
        let optimizer = registry::optimizer(optimizer).map(|method| method.options()).unwrap_or_default();
        let structure = StructureEntry::find(structure).map(|entry| entry.defaults()).unwrap_or_default();
        let rule = RULES.iter().find(|entry| entry.name == rule).map(|entry| entry.options).unwrap_or_default();
        let optimizer = optimizer.iter().map(|option| format!("optimizer.{}", option.name));
        let structure = structure.keys().map(|option| format!("adapter.{OPTIONS}.{option}"));
        let rule = rule.iter().map(|(option, ..)| format!("rule.{OPTIONS}.{option}"));
        optimizer.chain(structure).chain(rule).collect()
    }
}

/// The table of what a structure or a rule has of its own.
const OPTIONS: &str = "options";

fn section_error(section: &str, values: &Value, message: &str, origin_of: &dyn Fn(&str) -> Origin) -> ConfigError {
    // Enumerations are the only values whose content the kinds of keys do not check.
    let culprit =
        ["kind", "format", "backward", "scaling"].into_iter().find(|key| values.get(key).is_some()).unwrap_or("");
    let key = format!("{section}.{culprit}");
    ConfigError::Value {
        value: values.get(culprit).map(ToString::to_string).unwrap_or_default(),
        origin: origin_of(&key),
        key,
        reason: message.trim().to_string(),
    }
}

/// The value in the form that the section wants, if the key exists and takes it.
fn checked(assignment: &Assignment, own: &[String]) -> Result<Value, ConfigError> {
    let Assignment { key, value, origin } = assignment;
    let Some(kind) = KEYS.iter().find(|known| known.name == key).map(|known| known.kind) else {
        return match own.contains(key) {
            true => Ok(value.clone()),
            false => Err(unknown(key, origin.clone(), own)),
        };
    };
    let is_count = |value: &Value| matches!(value, Value::Integer(0..));
    let fitting = match (kind, value) {
        (Kind::Text, Value::String(_)) | (Kind::Flag, Value::Boolean(_)) | (Kind::Number, Value::Float(_)) => {
            Some(value.clone())
        }
        (Kind::Text, Value::Integer(_) | Value::Float(_)) => Some(Value::String(value.to_string())),
        (Kind::Number, Value::Integer(number)) => Some(Value::Float(*number as f64)),
        (Kind::Count, Value::Integer(0..)) => Some(value.clone()),
        (Kind::Texts, Value::String(_)) => Some(Value::Array(vec![value.clone()])),
        (Kind::Texts, Value::Array(items)) if items.iter().all(Value::is_str) => Some(value.clone()),
        (Kind::Counts, value) if is_count(value) => Some(Value::Array(vec![value.clone()])),
        (Kind::Counts, Value::Array(items)) if items.iter().all(is_count) => Some(value.clone()),
        _ => None,
    };
    fitting.ok_or_else(|| ConfigError::Value {
        key: key.clone(),
        value: value.to_string(),
        origin: origin.clone(),
        reason: format!("it must be a {}", kind.name()),
    })
}

fn unknown(key: &str, origin: Origin, own: &[String]) -> ConfigError {
    let known = KEYS.iter().map(|key| key.name.to_string()).chain(own.iter().cloned());
    let nearest = known
        .map(|candidate| (strsim::damerau_levenshtein(key, &candidate), candidate))
        .min()
        .filter(|(edits, candidate)| *edits <= candidate.len() / 2)
        .map(|(_, candidate)| candidate);
    ConfigError::Unknown { key: key.to_string(), origin, nearest }
}

/// Ranges of single values; what several parts decide together is checked where they meet.
fn check(config: &Config, origin_of: &dyn Fn(&str) -> Origin) -> Result<(), ConfigError> {
    let entries = config.entries();
    let refuse = |key: &str, reason: &str| {
        Err(ConfigError::Value {
            key: key.to_string(),
            value: entries.get(key).cloned().unwrap_or_default(),
            origin: origin_of(key),
            reason: reason.to_string(),
        })
    };
    let c = config;
    for (key, good) in [
        ("train.batch", c.train.batch > 0),
        ("train.seq_len", c.train.seq_len > 0),
        ("train.accumulation", c.train.accumulation > 0),
        ("log.every", c.log.every > 0),
        ("checkpoint.keep_last", c.checkpoint.keep_last > 0),
    ] {
        if !good {
            return refuse(key, "it must be at least 1");
        }
    }
    if !(c.optimizer.lr > 0.0 && c.optimizer.lr.is_finite()) {
        return refuse("optimizer.lr", "it must be greater than 0");
    }
    if c.train.backward == BackwardMode::PerLayer {
        let wrong = [
            (
                "optimizer.clip",
                c.optimizer.clip > 0.0,
                "the global norm is known only when all blocks are updated; set it to 0, and optimizer.block_clip for clipping block by block",
            ),
            (
                "train.accumulation",
                c.train.accumulation > 1,
                "a block would be updated before the next micro-batch; set it to 1 and raise train.batch",
            ),
            (
                "train.max_skipped_steps",
                c.train.max_skipped_steps > 0,
                "a step cannot be left out when some of its blocks are updated; set it to 0",
            ),
        ];
        for (key, wrong, reason) in wrong {
            if wrong {
                return refuse(key, &format!("with train.backward = per-layer {reason}"));
            }
        }
    } else if c.optimizer.block_clip > 0.0 {
        return refuse(
            "optimizer.block_clip",
            "it needs train.backward = per-layer; optimizer.clip is the global norm",
        );
    }
    let numbers = [
        ("optimizer.clip", c.optimizer.clip),
        ("optimizer.block_clip", c.optimizer.block_clip),
        ("train.minutes", c.train.minutes),
        ("train.epochs", c.train.epochs),
    ];
    for (key, value) in numbers {
        if !(value >= 0.0 && value.is_finite()) {
            return refuse(key, "it must be 0 or greater");
        }
    }
    for (key, value) in [
        ("schedule.final_fraction", c.schedule.final_fraction),
        ("schedule.decay_fraction", c.schedule.decay_fraction),
        ("schedule.warmup_fraction", c.schedule.warmup_fraction),
    ] {
        if !(0.0..=1.0).contains(&value) {
            return refuse(key, "it must be from 0 to 1");
        }
    }
    if !(c.data.validation_fraction > 0.0 && c.data.validation_fraction < 1.0) {
        return refuse("data.validation_fraction", "it must be between 0 and 1");
    }
    if !c.has_steps() && c.train.minutes == 0.0 {
        return refuse("train.steps", "the run has no end: set train.steps, train.epochs or train.minutes");
    }
    if !c.has_steps() && c.schedule.kind.needs_total() {
        return refuse(
            "schedule.kind",
            "it needs a known number of steps: set train.steps or train.epochs, or use `constant`",
        );
    }
    if !c.has_steps() && c.schedule.warmup_steps == 0 && c.schedule.warmup_fraction > 0.0 {
        return refuse(
            "schedule.warmup_fraction",
            "it needs a known number of steps: set train.steps or train.epochs, or schedule.warmup_steps",
        );
    }
    Ok(())
}

/// Line of a key in its section, or of the section's header.
fn line_of(text: &str, section: &str, key: &str) -> usize {
    let mut inside = false;
    let mut header = 1;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            inside = name.trim() == section;
            if inside {
                header = number + 1;
            }
        } else if inside && line.split('=').next().is_some_and(|name| name.trim().trim_matches('"') == key) {
            return number + 1;
        }
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(settings: &[&str]) -> Result<Config, ConfigError> {
        let mut layers = Layers::default();
        for setting in settings {
            layers.set(setting)?;
        }
        layers.resolve(&Config::default())
    }

    fn message(settings: &[&str]) -> String {
        resolve(settings).unwrap_err().to_string()
    }

    #[test]
    fn later_layers_win() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "[train]\nsteps = 7\nbatch = 3\nseed = 1\n").unwrap();
        let mut layers = Layers::default();
        layers.file(&path).unwrap();
        layers.set("train.batch=4").unwrap();
        layers.set("train.seed=2").unwrap();
        layers.flag("--seed", "train.seed", 5);
        let config = layers.resolve(&Config::default()).unwrap();
        assert_eq!((config.train.steps, config.train.batch, config.train.seed), (7, 4, 5));
        assert_eq!(config.train.seq_len, Config::default().train.seq_len);
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_and_the_line() {
        assert!(message(&["train.stesp=3"]).contains("train.steps"));
        assert!(message(&["trian.steps=3"]).contains("train.steps"));
        assert!(message(&["optimizer.rnak=3"]).contains("optimizer."));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "[model]\nname = \"llama-9m\"\n\n[train]\nstesp = 7\n").unwrap();
        let mut layers = Layers::default();
        layers.file(&path).unwrap();
        let error = layers.resolve(&Config::default()).unwrap_err().to_string();
        assert!(error.contains("line 5") && error.contains("train.steps"), "{error}");
    }

    #[test]
    fn wrong_types_and_ranges_name_key_and_origin() {
        for (setting, key) in [
            ("train.steps=many", "train.steps"),
            ("train.steps=-1", "train.steps"),
            ("train.batch=0", "train.batch"),
            ("optimizer.lr=0", "optimizer.lr"),
            ("optimizer.lr=nan", "optimizer.lr"),
            ("schedule.final_fraction=1.5", "schedule.final_fraction"),
            ("schedule.kind=step", "schedule.kind"),
            ("data.format=csv", "data.format"),
            ("data.validation_fraction=1", "data.validation_fraction"),
            ("model.tie_word_embeddings=1", "model.tie_word_embeddings"),
        ] {
            let message = message(&[setting]);
            assert!(message.contains(key) && message.contains("--set"), "{message}");
        }
        assert!(message(&["train.steps=0"]).contains("schedule.kind"));
        assert!(message(&["train.steps=0", "train.minutes=0"]).contains("no end"));
        assert!(message(&["nonsense"]).contains("section.key=value"));
    }

    #[test]
    fn values_take_bare_words_lists_and_whole_numbers() {
        let config =
            resolve(&["data.path=a.txt", "optimizer.lr=1", "model.hidden_size=64", "log.sample_prompt=7"]).unwrap();
        assert_eq!(config.data.path, [PathBuf::from("a.txt")]);
        assert_eq!(config.optimizer.lr, 1.0);
        assert_eq!(config.model.hidden_size, Some(64));
        assert_eq!(config.log.sample_prompt, "7");
        assert_eq!(resolve(&["data.path=[\"a\", \"b\"]"]).unwrap().data.path.len(), 2);
    }

    #[test]
    fn the_written_configuration_reads_back_equal() {
        let config = resolve(&[
            "model.name=llama-9m",
            "model.rope_theta=5e5",
            "optimizer.lr=0.1234567890123",
            "train.minutes=0.3",
        ])
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, config.to_toml()).unwrap();
        let mut layers = Layers::default();
        layers.file(&path).unwrap();
        assert_eq!(layers.resolve(&Config::default()).unwrap(), config);
    }

    #[test]
    fn only_settings_that_decide_the_result_are_compared() {
        let entries = |settings: &[&str]| resolve(settings).unwrap().deciding_entries();
        assert_eq!(entries(&[]), entries(&["log.every=5", "eval.every=3", "train.device=cpu:0", "checkpoint.every=1"]));
        for setting in
            ["optimizer.lr=1", "train.steps=9", "train.seed=1", "data.document_mask=false", "model.head_dim=8"]
        {
            assert_ne!(entries(&[]), entries(&[setting]), "{setting}");
        }
        let constant = "schedule.kind=constant";
        assert_eq!(entries(&[constant]), entries(&[constant, "train.steps=9"]));
    }
}
