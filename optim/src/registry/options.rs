//! Options of a method, read off its configuration, so that each is stated once: as a field.

use std::fmt;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::allowed::{Allowed, help};
use super::nearest::nearest;

/// Options by name, as they are given.
pub type Options = Map<String, Value>;

/// Keyword of a field without a default that makes sense: it has to be given. `#[schemars(extend("x-required" = true))]`.
const REQUIRED: &str = "x-required";

/// Keyword of an optional field: its meaning when it is not set. `#[schemars(extend("x-unset" = "..."))]`.
const UNSET: &str = "x-unset";

/// One option.
#[derive(Clone, Debug, PartialEq)]
pub struct OptionSpec {
    /// Name.
    pub name: String,
    /// Default; null for an optional one, none for one that has to be given.
    pub default: Option<Value>,
    /// Allowed values.
    pub allowed: Allowed,
    /// First paragraph of the field's documentation, as one line.
    pub help: String,
    unset: Option<String>,
    /// Names of the structs it is a field of, the outermost first, and its own.
    path: Vec<String>,
}

/// Options of a method with their defaults, in the order of their fields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptionList {
    help: String,
    specs: Vec<OptionSpec>,
    standard: Value,
}

/// An option that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// An option that the method does not have.
    #[error("{key}: {method} has no such option{}; {}", did_you_mean(nearest), known(options))]
    Unknown {
        /// The option, as it was given.
        key: String,
        /// The method.
        method: String,
        /// Most similar option.
        nearest: Option<String>,
        /// Its options, separated by commas.
        options: String,
    },
    /// An option that has to be given.
    #[error("{key} is not given: {method} needs it, {allowed}")]
    Missing {
        /// The option.
        key: String,
        /// The method.
        method: String,
        /// Allowed values, in words.
        allowed: String,
    },
    /// A value that is not allowed, or not together with the others.
    #[error("{key} = {value}: {reason}")]
    Value {
        /// The option, as it was given.
        key: String,
        /// Its value.
        value: String,
        /// Allowed values, and the remedy.
        reason: String,
    },
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|near| format!(" (did you mean \"{near}\"?)")).unwrap_or_default()
}

fn known(options: &str) -> String {
    if options.is_empty() { "it has none".into() } else { format!("its options: {options}") }
}

impl OptionError {
    /// A value with the reason why it cannot be used.
    pub fn value(key: impl Into<String>, value: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self::Value { key: key.into(), value: value.to_string(), reason: reason.into() }
    }

    /// The key that cannot be used.
    pub fn key(&self) -> &str {
        match self {
            Self::Unknown { key, .. } | Self::Missing { key, .. } | Self::Value { key, .. } => key,
        }
    }

    /// Puts the section before the key, so that the message names it as the user typed it.
    pub fn under(mut self, section: &str) -> Self {
        let (Self::Unknown { key, .. } | Self::Missing { key, .. } | Self::Value { key, .. }) = &mut self;
        *key = format!("{section}.{key}");
        self
    }
}

impl OptionSpec {
    /// Names of the structs it is a field of, the outermost first, and its own.
    pub fn path(&self) -> &[String] {
        &self.path
    }

    /// Default for people: a value, or the meaning of leaving it unset.
    pub fn default_text(&self) -> String {
        match (&self.default, &self.unset) {
            (_, Some(unset)) => unset.clone(),
            (None, None) => "required".into(),
            (Some(Value::Null), None) => "unset".into(),
            (Some(Value::String(text)), None) => text.clone(),
            (Some(value), None) => value.to_string(),
        }
    }

    /// Rejects a value that is not allowed.
    pub fn check(&self, value: &Value) -> Result<(), OptionError> {
        if self.allowed.accepts(value) {
            return Ok(());
        }
        // JSON has no infinities: a number that JSON cannot represent was one.
        let shown = if value.is_null() { "not a finite number".into() } else { value.to_string() };
        Err(OptionError::value(&self.name, shown, format!("must be {}", self.must_be())))
    }

    /// Allowed values after "must be".
    pub fn must_be(&self) -> String {
        if self.allowed.choices().len() > 1 { format!("one of {}", self.allowed) } else { self.allowed.to_string() }
    }

    /// JSON schema of the option with its documentation and default.
    pub fn schema(&self) -> Value {
        let mut schema = self.allowed.schema().clone();
        if let (Some(schema), Some(default)) = (schema.as_object_mut(), &self.default)
            && !default.is_null()
        {
            schema.insert("default".into(), default.clone());
        }
        schema
    }
}

impl OptionList {
    /// Options of a method that has none.
    pub fn none() -> Self {
        Self::default()
    }

    /// Options of a configuration: its fields, and those of the structs among its fields.
    ///
    /// `standard` holds the defaults; documentation and allowed values come from the type.
    pub fn of<C: JsonSchema + Serialize>(standard: &C) -> Self {
        let schema = SchemaSettings::default()
            .with(|settings| settings.inline_subschemas = true)
            .into_generator()
            .into_root_schema_for::<C>();
        let (text, standard) =
            (serde_json::to_string(standard).unwrap_or_default(), serde_json::to_value(standard).unwrap_or_default());
        let mut specs = Vec::new();
        collect(schema.as_value(), &standard, &[], &mut specs);
        // The schema lists fields by name; the text has them in the order of their declaration.
        specs.sort_by_cached_key(|spec| text.find(&format!("\"{}\":", spec.name)).unwrap_or(usize::MAX));
        Self { help: help(schema.as_value()), specs, standard }
    }

    /// First paragraph of the configuration's documentation, as one line.
    pub fn help(&self) -> &str {
        &self.help
    }

    /// Options in the order of their fields.
    pub fn iter(&self) -> std::slice::Iter<'_, OptionSpec> {
        self.specs.iter()
    }

    /// The option of this name.
    pub fn get(&self, name: &str) -> Option<&OptionSpec> {
        self.specs.iter().find(|spec| spec.name == name)
    }

    /// Returns true if there are none.
    pub fn is_empty(&self) -> bool {
        self.specs.is_empty()
    }

    /// Rejects unknown options, missing ones and values that are not allowed.
    pub fn check(&self, method: &str, given: &Options) -> Result<(), OptionError> {
        for (name, value) in given {
            let Some(spec) = self.get(name) else { return Err(self.unknown(method, name)) };
            spec.check(value)?;
        }
        match self.specs.iter().find(|spec| spec.default.is_none() && !given.contains_key(&spec.name)) {
            Some(spec) => Err(OptionError::Missing {
                key: spec.name.clone(),
                method: method.to_string(),
                allowed: spec.allowed.to_string(),
            }),
            None => Ok(()),
        }
    }

    /// Checked configuration with the given options on top of the defaults.
    pub fn configure<C: DeserializeOwned>(&self, method: &str, given: &Options) -> Result<C, OptionError> {
        self.check(method, given)?;
        serde_json::from_value(self.with(given.iter())).map_err(|error| {
            // Errors outside the schema: the option that fails alone is named.
            let alone = given.iter().find_map(|(name, value)| {
                let error = serde_json::from_value::<C>(self.with([(name, value)])).err()?;
                Some(OptionError::value(name, value, error.to_string()))
            });
            alone.unwrap_or_else(|| OptionError::value("options", Value::Object(given.clone()), error.to_string()))
        })
    }

    /// JSON schema of the table of options.
    pub fn schema(&self) -> Value {
        let properties: Map<String, Value> = self.specs.iter().map(|spec| (spec.name.clone(), spec.schema())).collect();
        serde_json::json!({ "type": "object", "additionalProperties": false, "properties": properties })
    }

    fn with<'a>(&self, given: impl IntoIterator<Item = (&'a String, &'a Value)>) -> Value {
        let mut values = self.standard.clone();
        for (name, value) in given {
            let Some(spec) = self.get(name) else { continue };
            let place = spec.path.iter().fold(&mut values, |values, name| &mut values[name.as_str()]);
            *place = value.clone();
        }
        values
    }

    fn unknown(&self, method: &str, name: &str) -> OptionError {
        let names = || self.specs.iter().map(|spec| spec.name.as_str());
        OptionError::Unknown {
            key: name.to_string(),
            method: method.to_string(),
            nearest: nearest(name, names()).map(str::to_string),
            options: names().collect::<Vec<_>>().join(", "),
        }
    }
}

/// Rejects a configuration with a value outside what its fields allow.
pub fn validate<C: JsonSchema + Serialize>(config: &C) -> Result<(), OptionError> {
    let list = OptionList::of(config);
    list.specs.iter().try_for_each(|spec| {
        let value = spec.path.iter().fold(&list.standard, |values, name| &values[name.as_str()]);
        spec.check(value)
    })
}

fn collect(schema: &Value, standard: &Value, above: &[String], specs: &mut Vec<OptionSpec>) {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    for (name, schema) in properties {
        let (path, value) = ([above, std::slice::from_ref(name)].concat(), &standard[name.as_str()]);
        if schema.get("properties").is_some() {
            collect(schema, value, &path, specs);
            continue;
        }
        let text = |keyword: &str| schema.get(keyword).and_then(Value::as_str).map(str::to_string);
        let required = schema.get(REQUIRED) == Some(&Value::Bool(true));
        let (help, unset) = (help(schema), text(UNSET));
        let mut schema = schema.clone();
        if let Some(schema) = schema.as_object_mut() {
            schema.retain(|keyword, _| ![REQUIRED, UNSET].contains(&keyword.as_str()));
        }
        specs.push(OptionSpec {
            name: name.clone(),
            default: (!required).then(|| value.clone()),
            allowed: Allowed::new(schema),
            help,
            unset,
            path,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::config::Config;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    enum Side {
        /// The rows.
        Left,
        /// The columns.
        Right,
    }

    #[derive(Config, Debug, JsonSchema)]
    struct Decay {
        /// Decay of the moment.
        #[config(default = 0.9)]
        #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
        beta: f64,
    }

    #[derive(Config, Debug, JsonSchema)]
    struct Sketch {
        /// Rank of the projection;
        /// smaller matrices use AdamW.
        #[schemars(range(min = 1), extend("x-required" = true))]
        rank: usize,
        /// Projected side.
        #[config(default = "Side::Left")]
        side: Side,
        /// Bits of the projector.
        #[config(default = 0)]
        #[schemars(extend("enum" = [0, 4, 8]))]
        bits: u32,
        decay: Decay,
        /// Seed.
        #[schemars(extend("x-unset" = "that of the run"))]
        seed: Option<u64>,
    }

    fn list() -> OptionList {
        OptionList::of(&Sketch::new(0, Decay::new()))
    }

    fn options(value: Value) -> Options {
        value.as_object().unwrap().clone()
    }

    fn refused(given: Value) -> String {
        list().configure::<Sketch>("sketch", &options(given)).unwrap_err().under("optimizer.options").to_string()
    }

    #[test]
    fn fields_give_names_in_their_order_defaults_help_and_ranges() {
        let list = list();
        let shown: Vec<_> = list.iter().map(|spec| (spec.name.as_str(), spec.default_text())).collect();
        let expected =
            [("rank", "required"), ("side", "left"), ("bits", "0"), ("beta", "0.9"), ("seed", "that of the run")];
        let names: Vec<_> = shown.iter().map(|(name, default)| (*name, default.as_str())).collect();
        let sorted = |mut list: Vec<(&'static str, &'static str)>| {
            list.sort();
            list
        };
        assert_eq!(names.len(), 5);
        assert_eq!(names[0], expected[0]);
        assert!(sorted(expected.to_vec()).iter().all(|pair| names.contains(pair)), "{names:?}");
        let rank = list.get("rank").unwrap();
        assert_eq!(rank.help, "Rank of the projection; smaller matrices use AdamW.");
        assert_eq!(rank.allowed.to_string(), "a whole number of at least 1");
        assert_eq!(list.get("side").unwrap().allowed.choices()[1].help, "The columns.");
    }

    #[test]
    fn options_are_set_wherever_their_field_is() {
        let given = options(json!({"rank": 3, "side": "right", "beta": 0.5, "seed": 7}));
        let config: Sketch = list().configure("sketch", &given).unwrap();
        assert_eq!((config.rank, config.decay.beta, config.seed), (3, 0.5, Some(7)));
        assert!(matches!(config.side, Side::Right));
    }

    #[test]
    fn refusals_name_the_key_the_value_and_what_is_allowed() {
        let value = |text: &str| format!("optimizer.options.{text}");
        assert_eq!(refused(json!({"rank": 0})), value("rank = 0: must be a whole number of at least 1"));
        assert_eq!(refused(json!({"rank": 1, "beta": 1})), value("beta = 1: must be a number from 0 to below 1"));
        assert_eq!(refused(json!({"rank": 1, "side": "top"})), value("side = \"top\": must be one of left, right"));
        assert_eq!(refused(json!({"rank": 1, "bits": 3})), value("bits = 3: must be one of 0, 4, 8"));
        assert_eq!(refused(json!({})), value("rank is not given: sketch needs it, a whole number of at least 1"));
        assert!(
            refused(json!({"rnak": 1})).starts_with(&value("rnak: sketch has no such option (did you mean \"rank\"?)"))
        );
    }

    #[test]
    fn a_configuration_made_in_code_meets_the_same_checks() {
        assert!(validate(&Sketch::new(2, Decay::new())).is_ok());
        let refusal = validate(&Sketch::new(2, Decay::new().with_beta(f64::NAN))).unwrap_err();
        assert_eq!(refusal.to_string(), "beta = not a finite number: must be a number from 0 to below 1");
        assert_eq!(validate(&Sketch::new(0, Decay::new())).unwrap_err().key(), "rank");
    }

    #[test]
    fn the_schema_of_the_table_has_defaults_and_help() {
        let schema = list().schema();
        assert_eq!(schema["properties"]["beta"]["default"], json!(0.9));
        assert_eq!(schema["properties"]["rank"].get("x-required"), None);
        assert_eq!(schema["properties"]["side"]["description"], "Projected side.");
    }
}
