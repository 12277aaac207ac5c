//! Keys with values, as they are given.

use toml::{Table, Value};

use super::error::Origin;

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

/// The last text that a key is given.
pub fn text<'a>(assignments: &'a [Assignment], key: &str) -> Option<&'a str> {
    assignments.iter().rev().find(|assignment| assignment.key == key)?.value.as_str()
}

/// Puts a value at `section.key`, however deep.
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
