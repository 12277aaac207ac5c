//! Keys with their given values.

use toml::{Table, Value};

use super::error::Origin;

/// Value given to a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// Key as `section.key`.
    pub key: String,
    /// Value of the key.
    pub value: Value,
    /// Origin of the value.
    pub origin: Origin,
}

/// Last string given to a key.
pub fn text<'a>(assignments: &'a [Assignment], key: &str) -> Option<&'a str> {
    assignments.iter().rev().find(|assignment| assignment.key == key)?.value.as_str()
}

/// Sets a value at `section.key`, at any depth.
pub fn put(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => drop(table.insert(key.to_string(), value)),
        Some((section, below)) => {
            let entry = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if !entry.is_table() {
                *entry = Value::Table(Table::new());
            }
            if let Value::Table(table) = entry {
                put(table, below, value);
            }
        }
    }
}
