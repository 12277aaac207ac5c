//! Supported keys with their allowed values.

use lowrank_optim::registry::{Entry, Kind, OptionList, OptionSpec, find};
use toml::{Table, Value};

use super::assignment::{Assignment, put, text};
use super::error::{ConfigError, Origin};
use super::keys::{Key, sections};
use super::methods::{NONE, SLOTS, Slot, moved, nearest_key};
use super::{Config, Job};

/// Supported keys: those of the sections and the options of the methods that they name.
pub struct Known {
    job: Job,
    keys: Vec<Key>,
    methods: Vec<(Slot, String, OptionList)>,
}

impl Known {
    /// Collects the supported keys. Options of methods that are no longer selected are removed from the table.
    pub fn of(given: &[Assignment], base: &Config, table: &mut Table) -> Result<Self, ConfigError> {
        let entries = base.entries();
        let mut methods = Vec::new();
        for slot in SLOTS {
            let key = slot.name_key();
            if !base.run.job.knows(&key) {
                continue;
            }
            let before = entries.get(&key).map_or("", String::as_str).trim_matches('"').to_string();
            let name = text(given, &key).unwrap_or(&before).to_string();
            if name != before {
                put(table, &format!("{}.options", slot.section), Value::Table(Table::new()));
            }
            let options = match slot.options(&name) {
                Some(options) => options,
                // A folder, or no adapter.
                None if slot.kind == Kind::Structure => OptionList::none(),
                None if [Kind::Allocation, Kind::Penalty].contains(&slot.kind) && name == NONE => OptionList::none(),
                None => return Err(unknown_method(given, slot, &name)),
            };
            methods.push((slot, name, options));
        }
        let keys = sections(base.run.job).into_iter().flat_map(|section| section.keys).collect();
        Ok(Self { job: base.run.job, keys, methods })
    }

    /// Returns the value in the form that the section needs, if the key exists and allows it.
    pub fn checked(&self, assignment: &Assignment) -> Result<Value, ConfigError> {
        let Assignment { key, origin, .. } = assignment;
        if let Some(known) = self.keys.iter().find(|known| known.name == *key && !known.is_options()) {
            return allowed(&known.option, assignment);
        }
        let options = self.methods.iter().find_map(|(slot, name, list)| {
            let option = key.strip_prefix(slot.section)?.strip_prefix(".options.")?;
            Some((name, list, option))
        });
        if let Some((name, list, option)) = options {
            // Each setting has a single key.
            if key == "optimizer.options.weight_decay" {
                return Err(ConfigError::Moved {
                    key: key.clone(),
                    origin: origin.clone(),
                    to: "optimizer.weight_decay".into(),
                });
            }
            return match list.get(option) {
                Some(spec) => allowed(spec, assignment),
                None => Err(self.unknown(assignment, Some((name, list)))),
            };
        }
        if !self.job.knows(key) && is_known_elsewhere(key) {
            return Err(ConfigError::Elsewhere { key: key.clone(), origin: origin.clone(), job: self.job });
        }
        match moved(key) {
            Some(to) => Err(ConfigError::Moved { key: key.clone(), origin: origin.clone(), to }),
            None => Err(self.unknown(assignment, None)),
        }
    }

    fn unknown(&self, assignment: &Assignment, method: Option<(&String, &OptionList)>) -> ConfigError {
        let own = self.methods.iter().flat_map(|(slot, _, list)| {
            list.iter().map(move |option| format!("{}.options.{}", slot.section, option.name))
        });
        let keys = self.keys.iter().filter(|key| !key.is_options()).map(|key| key.name.clone());
        let known: Vec<String> = keys.chain(own).collect();
        ConfigError::Unknown {
            key: assignment.key.clone(),
            origin: assignment.origin.clone(),
            nearest: nearest_key(&assignment.key, &known),
            method: method.map(|(name, list)| {
                let options = list.iter().map(|option| option.name.as_str()).collect::<Vec<_>>().join(", ");
                Box::new((name.clone(), options))
            }),
        }
    }
}

/// Returns true if the key, or the table of options that it belongs to, exists in any job.
fn is_known_elsewhere(key: &str) -> bool {
    let is = |known: &Key| known.name == key || known.is_options() && key.starts_with(&format!("{}.", known.name));
    [Job::Pretrain, Job::Finetune].into_iter().flat_map(sections).any(|section| section.keys.iter().any(is))
}

/// Returns the value in the form that the option needs, if it is allowed.
fn allowed(option: &OptionSpec, assignment: &Assignment) -> Result<Value, ConfigError> {
    let value = fitting(option.allowed.schema(), &assignment.value);
    let is_allowed = serde_json::to_value(&value).is_ok_and(|json| option.allowed.accepts(&json));
    if is_allowed {
        return Ok(value);
    }
    Err(ConfigError::Value {
        key: assignment.key.clone(),
        value: assignment.value.to_string(),
        origin: assignment.origin.clone(),
        reason: format!("must be {}", option.must_be()),
    })
}

/// Converts a value to the type of the schema: a number to a string, an integer to a float, a single value to a list.
fn fitting(schema: &serde_json::Value, value: &Value) -> Value {
    let wants = |name: &str| {
        let kind = &schema["type"];
        kind == name || kind.as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == name))
    };
    match value {
        Value::Integer(number) if wants("number") => Value::Float(*number as f64),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) if wants("string") => Value::String(value.to_string()),
        Value::String(_) | Value::Integer(_) if wants("array") => Value::Array(vec![value.clone()]),
        value => value.clone(),
    }
}

/// Error for a name that no method of the kind has, with the nearest one of any kind.
fn unknown_method(given: &[Assignment], slot: Slot, name: &str) -> ConfigError {
    let others: Vec<Entry> = SLOTS.into_iter().flat_map(Slot::methods).collect();
    let key = slot.name_key();
    let given = given.iter().rev().find(|assignment| assignment.key == key);
    let reason = match find(slot.kind, &slot.methods(), name) {
        Ok(_) => String::new(),
        Err(unknown) => format!("{}; `lowrank methods` lists all", unknown.or_of(&others)),
    };
    let origin = given.map_or(Origin::Default, |given| given.origin.clone());
    ConfigError::Value { key, value: format!("\"{name}\""), origin, reason }
}
