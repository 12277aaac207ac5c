//! Defaults, file, `--set` and flags, laid over one another.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::assignment::{Assignment, put, text};
use super::check::check;
use super::error::{ConfigError, Origin};
use super::known::Known;
use super::{Config, Job};

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
        self.table(path, &text, "", table);
        Ok(())
    }

    fn table(&mut self, path: &Path, text: &str, section: &str, table: Table) {
        for (name, value) in table {
            let key = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
            match value {
                Value::Table(below) => self.table(path, text, &key, below),
                value => {
                    let origin = Origin::File(path.to_path_buf(), line_of(text, section, &name));
                    self.assignments.push(Assignment { key, value, origin });
                }
            }
        }
    }

    /// Adds `section.key=value`; a value that is not valid TOML counts as a string.
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

    /// Adds the value of an optional flag, if given.
    pub fn optional(&mut self, flag: &'static str, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.flag(flag, key, value);
        }
    }

    /// Keys that are set.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.assignments.iter().map(|assignment| assignment.key.as_str())
    }

    /// Returns true if any layer sets the key.
    pub fn has(&self, key: &str) -> bool {
        self.assignments.iter().any(|assignment| assignment.key == key)
    }

    /// Resolves and checks the configuration of all layers over `base`.
    pub fn resolve(&self, base: &Config) -> Result<Config, ConfigError> {
        self.check_job(base.run.job)?;
        let mut table = base.table();
        let assignments = self.with_structure(base);
        let known = Known::of(&assignments, base, &mut table)?;
        self.default_schedule(base, &mut table);
        let mut origins = BTreeMap::new();
        for assignment in &assignments {
            let value = known.checked(assignment)?;
            put(&mut table, &assignment.key, value);
            origins.insert(assignment.key.as_str(), assignment);
        }
        let origin_of = |key: &str| origins.get(key).map_or(Origin::Default, |assignment| assignment.origin.clone());
        let config = Config::deserialize(Value::Table(table)).map_err(|error| ConfigError::Value {
            key: "configuration".into(),
            value: String::new(),
            origin: Origin::Default,
            reason: error.to_string(),
        })?;
        check(&config, &origin_of)?;
        Ok(config)
    }

    fn check_job(&self, job: Job) -> Result<(), ConfigError> {
        let other =
            self.assignments.iter().find(|given| given.key == "run.job" && given.value.as_str() != Some(job.name()));
        let Some(Assignment { key, value, origin }) = other.cloned() else { return Ok(()) };
        let reason = match value.as_str() {
            Some(other) => format!("this is `lowrank {}`; use `lowrank {other}`", job.name()),
            None => "must be a text".into(),
        };
        Err(ConfigError::Value { key, value: value.to_string(), origin, reason })
    }

    /// All assignments, with the structure that a newly chosen allocation works on unless one is given.
    fn with_structure(&self, base: &Config) -> Vec<Assignment> {
        let mut assignments = self.assignments.clone();
        let allocation = text(&assignments, "allocation.name").filter(|name| *name != base.allocation.name);
        if let Some(structure) = allocation.and_then(super::methods::structure_of)
            && !self.has("adapter.name")
        {
            let value = Value::String(structure.into());
            assignments.push(Assignment { key: "adapter.name".into(), value, origin: Origin::Default });
        }
        assignments
    }

    /// Sets the schedule from the paper of a parameterization with restarts, unless one is given.
    fn default_schedule(&self, base: &Config, table: &mut Table) {
        let name = text(&self.assignments, "model.parameterization.name")
            .filter(|name| *name != base.model.parameterization.name);
        if name.is_some_and(super::methods::restarts) {
            put(table, "schedule.kind", Value::String("cosine-restarts".into()));
        }
    }
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
    use std::path::PathBuf;

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
        assert!(message(&["optimizer.options.rnak=3"]).contains("optimizer."));
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
            ("data.validation_fraction=1.5", "data.validation_fraction"),
            ("data.validation_fraction=0", "data.validation_fraction"),
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
    fn refusals_name_the_key_that_was_typed_and_the_cure() {
        for (settings, parts) in [
            (vec!["optimizer.rank=3"], ["optimizer.rank", "write optimizer.options.rank"]),
            (vec!["model.rank=3"], ["model.rank", "write model.parameterization.options.rank"]),
            (vec!["model.parameterization=sltrain"], ["model.parameterization;", "write model.parameterization.name"]),
            (vec!["optimizer.options.weight_decay=0.1"], ["optimizer.options", "write optimizer.weight_decay"]),
            (
                vec!["optimizer.name=galore", "optimizer.options.rank=0"],
                ["optimizer.options.rank = 0", "must be a whole number from 1 to 1000000"],
            ),
            (
                vec!["optimizer.name=galore", "optimizer.options.side=top"],
                ["optimizer.options.side = \"top\"", "must be one of std, std_left"],
            ),
            (
                vec!["optimizer.name=galore", "optimizer.options.rnak=4"],
                ["did you mean optimizer.options.rank?", "options of galore: rank"],
            ),
            (vec!["optimizer.name=galroe"], ["optimizer.name = \"galroe\"", "did you mean \"galore\"?"]),
            (
                vec!["optimizer.name=lora-pro"],
                ["no optimizer is named", "did you mean the training rule \"lora-pro\"?"],
            ),
            (vec!["rule.name=plain"], ["rule.name", "not supported in `lowrank pretrain`; remove it"]),
            (vec!["train.batch=65537"], ["train.batch = 65537", "must be a whole number from 1 to 65536"]),
        ] {
            let message = message(&settings);
            for part in parts {
                assert!(message.contains(part), "{settings:?}: {message}");
            }
        }
        let mut layers = Layers::default();
        layers.set("rule.name=lora-plus").unwrap();
        layers.set("rule.options.ratio=-1").unwrap();
        let message = layers.resolve(&Config::of(Job::Finetune)).unwrap_err().to_string();
        assert!(message.starts_with("rule.options.ratio = -1 (--set): must be a number"), "{message}");
    }

    #[test]
    fn options_of_a_method_go_when_another_is_chosen() {
        let galore = resolve(&["optimizer.name=galore", "optimizer.options.rank=4"]).unwrap();
        assert_eq!(galore.optimizer.options["rank"], 4);
        let mut layers = Layers::default();
        layers.set("optimizer.name=adamw").unwrap();
        assert!(layers.resolve(&galore).unwrap().optimizer.options.is_empty());
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
