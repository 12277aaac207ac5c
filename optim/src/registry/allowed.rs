//! Values that an option allows: a JSON schema, with its check and its description in words.

use std::fmt;

use serde_json::{Map, Value};

/// Values that an option allows.
#[derive(Clone, Debug, PartialEq)]
pub struct Allowed {
    schema: Value,
}

/// One of the words that an option allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The word.
    pub word: String,
    /// First paragraph of its documentation.
    pub help: String,
}

impl Allowed {
    pub(super) fn new(schema: Value) -> Self {
        Self { schema }
    }

    /// JSON schema of the value.
    pub fn schema(&self) -> &Value {
        &self.schema
    }

    /// Returns true if the value is allowed.
    pub fn accepts(&self, value: &Value) -> bool {
        accepts(&self.schema, value)
    }

    /// Words it chooses from, if it is one of some words.
    pub fn choices(&self) -> Vec<Choice> {
        choices(&self.schema)
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&words(&self.schema))
    }
}

fn accepts(schema: &Value, value: &Value) -> bool {
    let Some(schema) = schema.as_object() else { return schema != &Value::Bool(false) };
    schema.iter().all(|(keyword, of)| match (keyword.as_str(), of) {
        ("type", Value::String(name)) => is_a(value, name),
        ("type", Value::Array(names)) => names.iter().filter_map(Value::as_str).any(|name| is_a(value, name)),
        ("enum", Value::Array(allowed)) => allowed.iter().any(|one| same(one, value)),
        ("const", one) => same(one, value),
        ("oneOf" | "anyOf", Value::Array(any)) => any.iter().any(|one| accepts(one, value)),
        ("not", one) => !accepts(one, value),
        ("allOf", Value::Array(all)) => all.iter().all(|one| accepts(one, value)),
        ("minimum", least) => compares(value, least, |value, least| value >= least),
        ("exclusiveMinimum", least) => compares(value, least, |value, least| value > least),
        ("maximum", most) => compares(value, most, |value, most| value <= most),
        ("exclusiveMaximum", most) => compares(value, most, |value, most| value < most),
        ("items", each) => value.as_array().is_none_or(|items| items.iter().all(|item| accepts(each, item))),
        ("minItems", least) => compares_length(value, least, |length, least| length >= least),
        ("maxItems", most) => compares_length(value, most, |length, most| length <= most),
        _ => true,
    })
}

fn is_a(value: &Value, name: &str) -> bool {
    match name {
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => value.is_null(),
    }
}

/// Compares values, with 4 equal to 4.0.
fn same(a: &Value, b: &Value) -> bool {
    a == b || a.is_number() && a.as_f64() == b.as_f64()
}

fn compares(value: &Value, bound: &Value, holds: fn(f64, f64) -> bool) -> bool {
    value.as_f64().zip(bound.as_f64()).is_none_or(|(value, bound)| holds(value, bound))
}

fn compares_length(value: &Value, bound: &Value, holds: fn(u64, u64) -> bool) -> bool {
    let length = value.as_array().map(|items| items.len() as u64);
    length.zip(bound.as_u64()).is_none_or(|(length, bound)| holds(length, bound))
}

fn choices(schema: &Value) -> Vec<Choice> {
    let word = |one: &Value| match one {
        Value::Null => None,
        Value::String(word) => Some(word.clone()),
        other => Some(other.to_string()),
    };
    let mut found = Vec::new();
    if let Some(Value::Array(any)) = schema.get("oneOf").or_else(|| schema.get("anyOf")) {
        for one in any.iter().filter(|one| one.get("type") != Some(&Value::from("null"))) {
            match one.get("const").and_then(word) {
                Some(word) => found.push(Choice { word, help: help(one) }),
                None => match choices(one) {
                    // Bounds in addition to words: not a choice of words.
                    words if words.is_empty() => return Vec::new(),
                    words => found.extend(words),
                },
            }
        }
    }
    if let Some(Value::Array(words)) = schema.get("enum") {
        let words: Vec<String> = words.iter().filter_map(word).collect();
        if found.is_empty() {
            return words.into_iter().map(|word| Choice { word, help: String::new() }).collect();
        }
        found.retain(|choice| words.contains(&choice.word));
    }
    found
}

/// First paragraph of a description, as one line.
pub(super) fn help(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    text.split("\n\n").next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn words(schema: &Value) -> String {
    let choices = choices(schema);
    if !choices.is_empty() {
        return choices.into_iter().map(|choice| choice.word).collect::<Vec<_>>().join(", ");
    }
    let Some(object) = schema.as_object() else { return "any value".into() };
    if let Some(Value::Array(any)) = object.get("anyOf").or_else(|| object.get("oneOf")) {
        // The alternatives of a number state bounds alone.
        let kind = object.get("type").and_then(Value::as_str).map(noun).unwrap_or_default();
        let any: Vec<String> = any
            .iter()
            .filter(|one| one.get("type") != Some(&Value::from("null")))
            .map(|one| one.get("const").map_or_else(|| words(one), Value::to_string))
            .collect();
        let separator = if kind.is_empty() { "" } else { ": " };
        return format!("{kind}{separator}{}", any.join(", or "));
    }
    let name = match object.get("type") {
        Some(Value::String(name)) => name.as_str(),
        Some(Value::Array(names)) => {
            names.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or_default()
        }
        _ => "",
    };
    let bounds = if matches!(name, "integer" | "number" | "") { bounds(object, name == "integer") } else { None };
    let other = object.get("not").and_then(|not| not.get("const")).map(|one| format!("other than {one}"));
    let bounds = match (bounds, other) {
        (Some(bounds), Some(other)) => Some(format!("{bounds}, {other}")),
        (bounds, other) => bounds.or(other),
    };
    match (name, bounds) {
        ("", Some(bounds)) => bounds,
        ("array", _) => {
            let items = object.get("items").map(words).unwrap_or_default();
            format!("a list, each {items}")
        }
        (name, Some(bounds)) => format!("{} {bounds}", noun(name)),
        (name, None) => noun(name).to_string(),
    }
}

fn noun(name: &str) -> &'static str {
    match name {
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "a text",
        "boolean" => "true or false",
        "object" => "a table",
        _ => "any value",
    }
}

fn bounds(schema: &Map<String, Value>, whole: bool) -> Option<String> {
    let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
    let (least, above) = (bound("minimum"), bound("exclusiveMinimum"));
    let (most, below) = (bound("maximum"), bound("exclusiveMaximum"));
    let shown = |value: f64| {
        let exact = value.fract() == 0.0 && value.abs() < 1e15;
        if exact { format!("{}", value as i64) } else { format!("{value:e}") }
    };
    let plain = |value: f64| if value.abs() >= 1e-3 && value.abs() < 1e6 { value.to_string() } else { shown(value) };
    let text = match (least, above, most, below) {
        (Some(least), None, Some(most), None) => format!("from {} to {}", plain(least), plain(most)),
        (Some(least), None, None, Some(below)) => format!("from {} to below {}", plain(least), plain(below)),
        (None, Some(above), Some(most), None) => format!("greater than {} and at most {}", plain(above), plain(most)),
        (None, Some(above), None, Some(below)) => format!("above {} and below {}", plain(above), plain(below)),
        (Some(least), ..) if whole && least == 0.0 => return None,
        (Some(least), ..) => format!("of at least {}", plain(least)),
        (None, Some(above), ..) => format!("greater than {}", plain(above)),
        (None, None, Some(most), _) => format!("of at most {}", plain(most)),
        (None, None, None, Some(below)) => format!("below {}", plain(below)),
        _ => return None,
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(schema: Value) -> String {
        Allowed::new(schema).to_string()
    }

    #[test]
    fn bounds_are_checked_and_said() {
        let share = Allowed::new(json!({"type": "number", "minimum": 0, "exclusiveMaximum": 1}));
        assert_eq!(share.to_string(), "a number from 0 to below 1");
        assert!(share.accepts(&json!(0)) && share.accepts(&json!(0.5)));
        assert!(!share.accepts(&json!(1)) && !share.accepts(&json!("0.5")) && !share.accepts(&json!(f64::NAN)));
        let count = Allowed::new(json!({"type": "integer", "minimum": 1}));
        assert_eq!(count.to_string(), "a whole number of at least 1");
        assert!(!count.accepts(&json!(2.5)) && !count.accepts(&json!(0)) && count.accepts(&json!(u64::MAX)));
        assert_eq!(said(json!({"type": ["integer", "null"], "minimum": 0})), "a whole number");
        assert_eq!(said(json!({"type": "number", "exclusiveMinimum": 0})), "a number greater than 0");
        assert_eq!(
            said(json!({"type": "array", "items": {"type": "integer", "minimum": 0}})),
            "a list, each a whole number"
        );
    }

    #[test]
    fn words_and_alternatives_are_checked_and_said() {
        let side = json!({"oneOf": [{"const": "left", "description": "Rows."}, {"const": "right"}, {"const": "full"}]});
        let fewer = Allowed::new(json!({"oneOf": side["oneOf"], "enum": ["left", "right"]}));
        assert_eq!(fewer.to_string(), "left, right");
        assert_eq!(fewer.choices()[0], Choice { word: "left".into(), help: "Rows.".into() });
        assert!(fewer.accepts(&json!("left")) && !fewer.accepts(&json!("full")) && !fewer.accepts(&json!("top")));
        let limit = Allowed::new(json!({"type": "number", "anyOf": [{"const": 0}, {"exclusiveMinimum": 1}]}));
        assert!(limit.accepts(&json!(0.0)) && limit.accepts(&json!(1.5)) && !limit.accepts(&json!(0.5)));
        assert_eq!(limit.to_string(), "a number: 0, or greater than 1");
        let factor = Allowed::new(json!({"type": "number", "not": {"const": 0}}));
        assert!(factor.accepts(&json!(-1)) && !factor.accepts(&json!(0.0)));
        assert_eq!(factor.to_string(), "a number other than 0");
        let bits = Allowed::new(json!({"type": "integer", "enum": [0, 4, 8]}));
        assert_eq!(bits.to_string(), "0, 4, 8");
        assert!(bits.accepts(&json!(4)) && !bits.accepts(&json!(3)));
        let optional = Allowed::new(json!({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}));
        assert!(optional.accepts(&Value::Null) && optional.accepts(&json!("b")) && !optional.accepts(&json!("c")));
        assert_eq!(optional.to_string(), "a, b");
    }
}
