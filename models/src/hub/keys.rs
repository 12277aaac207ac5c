//! The keys of a `config.json` while they are read.

use serde_json::{Map, Value};

/// Keys that have not been read yet.
pub(super) struct Keys {
    pub map: Map<String, Value>,
}

impl Keys {
    pub fn present(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    pub fn count(&mut self, key: &str, default: Option<usize>) -> Result<usize, String> {
        match (self.take(key), default) {
            (Some(value), _) => whole(key, &value),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(format!("{key} is missing")),
        }
    }

    pub fn number(&mut self, key: &str, default: f64) -> Result<f64, String> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| format!("{key} is {value}; it must be a number")),
        }
    }

    pub fn flag(&mut self, key: &str, default: bool) -> Result<bool, String> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| format!("{key} is {value}; it must be true or false")),
        }
    }

    /// The list under a key, at least as long as the model has layers.
    pub fn of_layers(&mut self, key: &str, layers: usize) -> Result<Option<Vec<Value>>, String> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(mut values)) if values.len() >= layers => {
                values.truncate(layers);
                Ok(Some(values))
            }
            Some(Value::Array(values)) => Err(format!(
                "{key} has {} entries; num_hidden_layers is {layers}: it must have one for each",
                values.len()
            )),
            Some(other) => Err(format!("{key} is {other}; it must be a list with an entry for each layer")),
        }
    }
}

pub(super) fn whole(key: &str, value: &Value) -> Result<usize, String> {
    let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
    number.ok_or_else(|| format!("{key} is {value}; it must be a whole number"))
}

/// Ids in a value that holds one or several.
pub(super) fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}
