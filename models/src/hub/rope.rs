//! Rotary settings in `config.json`, in the spelling of any version of `transformers`.

use serde_json::{Map, Value, json};

use super::family::Defaults;
use crate::llama::RopeScaling;

/// Content of the rotary keys.
#[derive(Debug, Default)]
pub(super) struct Settings {
    /// Base of the angles, if it is part of the rotary settings.
    pub theta: Option<f64>,
    pub scaling: Option<RopeScaling>,
}

/// Keys of the settings: since version 5, and before.
const PARAMETERS: &str = "rope_parameters";
const SCALING: &str = "rope_scaling";
/// Kinds of rotary positions.
const KINDS: [&str; 5] = ["default", "linear", "dynamic", "llama3", "yarn"];
/// Positions of the training, which some configurations have outside the settings.
const ORIGINAL: &str = "original_max_position_embeddings";
/// Keys that a kind does not use and that `transformers` ignores: they belong to other kinds or describe the origin of the settings.
const PASSED_OVER: [&str; 11] = [
    ORIGINAL,
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
];

impl Settings {
    /// Takes the settings out of a configuration. Unknown keys that would change the computation are rejected by name, and so are two
    /// groups of settings that contradict each other.
    pub fn take(map: &mut Map<String, Value>, defaults: &Defaults) -> Result<Self, String> {
        let mut object = |key: &str| match map.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(settings)) if settings.is_empty() => Ok(None),
            Some(Value::Object(settings)) => Ok(Some(settings)),
            Some(other) => Err(format!("{key} is {other}; it must be an object")),
        };
        let (new, old) = (object(PARAMETERS)?, object(SCALING)?);
        Self::partial("", map)?;
        let read = |place: &str, settings: &Map<String, Value>| Self::read(place, settings.clone(), map, defaults);
        match (new, old) {
            (Some(new), Some(old)) => {
                let settings = [read(PARAMETERS, &new)?, read(SCALING, &old)?];
                same(&new, &old, settings[0].scaling == settings[1].scaling)?;
                let outside = map.get("rope_theta").and_then(Value::as_f64).unwrap_or(defaults.rope_theta);
                let [theta, other] = [&settings[0], &settings[1]].map(|settings| settings.theta.unwrap_or(outside));
                if theta != other {
                    return Err(contradiction("rope_theta", theta, other));
                }
                let [settings, _] = settings;
                Ok(Self { theta: Some(theta), ..settings })
            }
            (Some(settings), None) => read(PARAMETERS, &settings),
            (None, Some(settings)) => read(SCALING, &settings),
            (None, None) => Ok(Self::default()),
        }
    }

    /// Reads the settings under the key `place` of the configuration `map`.
    fn read(
        place: &str,
        mut settings: Map<String, Value>,
        map: &Map<String, Value>,
        defaults: &Defaults,
    ) -> Result<Self, String> {
        Self::partial(&format!("{place}."), &mut settings)?;
        let theta = match settings.remove("rope_theta").filter(|theta| !theta.is_null()) {
            None => None,
            Some(theta) => {
                Some(theta.as_f64().ok_or_else(|| format!("{place}.rope_theta is {theta}; it must be a number"))?)
            }
        };
        let kind = kind(&settings);
        settings.remove("type");
        settings.remove("rope_type");
        settings.retain(|_, value| !value.is_null());
        if !KINDS.contains(&kind.as_str()) {
            return Err(format!("{place}.rope_type is \"{kind}\"; {} can be read", KINDS.join(", ")));
        }
        if let Some(key) = settings.keys().find(|key| !PASSED_OVER.contains(&key.as_str())) {
            return Err(format!("{place}.{key} is {}; this setting is not known", settings[key]));
        }
        if kind == "default" {
            return Ok(Self { theta, scaling: None });
        }
        if ["llama3", "yarn"].contains(&kind.as_str()) {
            let positions =
                map.get("max_position_embeddings").cloned().unwrap_or(json!(defaults.max_position_embeddings));
            match map.get(ORIGINAL).filter(|value| !value.is_null()) {
                Some(outside) => drop(settings.insert(ORIGINAL.into(), outside.clone())),
                None => drop(settings.entry(ORIGINAL).or_insert(positions)),
            }
        }
        settings.insert("rope_type".into(), json!(kind));
        let scaling = serde_json::from_value(Value::Object(settings))
            .map_err(|error| format!("{place}.rope_type is \"{kind}\": {error}"))?;
        Ok(Self { theta, scaling: Some(scaling) })
    }

    /// Rejects angles for a part of each head in settings whose keys have this prefix.
    fn partial(prefix: &str, settings: &mut Map<String, Value>) -> Result<(), String> {
        const KEY: &str = "partial_rotary_factor";
        match settings.remove(KEY) {
            Some(value) if !value.is_null() && value.as_f64() != Some(1.0) => {
                Err(format!("{prefix}{KEY} is {value}; only 1 is supported"))
            }
            _ => Ok(()),
        }
    }
}

/// Rejects two groups of settings of which one contradicts the other. A parameter that only one of them has is a contradiction when
/// they do not mean the `same` computation, in which its default is another value.
fn same(new: &Map<String, Value>, old: &Map<String, Value>, same: bool) -> Result<(), String> {
    if kind(new) != kind(old) {
        return Err(contradiction("rope_type", json!(kind(new)), json!(kind(old))));
    }
    let parameter = |key: &&String| !["rope_type", "type", "rope_theta"].contains(&key.as_str());
    for key in new.keys().chain(old.keys()).filter(parameter) {
        let [one, other] = [new, old].map(|settings| settings.get(key).filter(|value| !value.is_null()));
        let equal = match (one, other) {
            (Some(one), Some(other)) => one == other || (one.is_number() && one.as_f64() == other.as_f64()),
            (None, None) => true,
            _ => same,
        };
        if !equal {
            let shown = |value: Option<&Value>| value.map_or("missing".into(), Value::to_string);
            return Err(contradiction(key, shown(one), shown(other)));
        }
    }
    Ok(())
}

fn contradiction(key: &str, new: impl std::fmt::Display, old: impl std::fmt::Display) -> String {
    format!("{PARAMETERS}.{key} is {new}, but {SCALING}.{key} is {old}; keep one of the two groups of settings")
}

/// The kind that settings name, under the newer key first.
fn kind(settings: &Map<String, Value>) -> String {
    let named = ["rope_type", "type"].into_iter().find_map(|key| settings.get(key).filter(|kind| !kind.is_null()));
    named.map_or("default".into(), |kind| kind.as_str().map_or(kind.to_string(), str::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::Family;

    fn take(value: Value) -> Result<Settings, String> {
        let Value::Object(mut map) = value else { unreachable!("it is an object") };
        let settings = Settings::take(&mut map, &Defaults::of(Family::Llama))?;
        assert!(!map.contains_key(PARAMETERS) && !map.contains_key(SCALING));
        Ok(settings)
    }

    #[test]
    fn every_spelling_gives_the_same_settings() {
        let llama3 = |original: f64| RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        };
        let own = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        let with = |key: &str, value: Value| {
            let mut settings = own.clone();
            settings[key] = value;
            settings
        };
        for (config, original) in [
            (json!({SCALING: with("rope_type", json!("llama3"))}), 64.0),
            (json!({SCALING: with("type", json!("llama3"))}), 64.0),
            (json!({PARAMETERS: with("rope_type", json!("llama3"))}), 64.0),
            (json!({PARAMETERS: with("rope_type", json!("llama3")), ORIGINAL: 32}), 32.0),
            (
                json!({SCALING: {"type": "llama3", "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}, "max_position_embeddings": 99}),
                99.0,
            ),
        ] {
            assert_eq!(take(config.clone()).unwrap().scaling, Some(llama3(original)), "{config}");
        }
        assert_eq!(take(json!({PARAMETERS: {"rope_type": "default", "rope_theta": 5e5}})).unwrap().theta, Some(5e5));
        for nothing in
            [json!({}), json!({SCALING: null}), json!({PARAMETERS: {}}), json!({SCALING: {"type": "default"}})]
        {
            assert_eq!(take(nothing).unwrap().scaling, None);
        }
    }

    #[test]
    fn what_is_not_known_is_refused_by_its_key() {
        for (config, part) in [
            (json!({SCALING: {"type": "longrope", "short_factor": [1], "long_factor": [1]}}), "longrope"),
            (json!({SCALING: {"type": "su", "factor": 2}}), "\"su\""),
            (json!({SCALING: {"type": "linear"}}), "factor"),
            (json!({SCALING: {"type": "linear", "factor": "two"}}), "rope_scaling.rope_type"),
            (json!({SCALING: {"type": "linear", "factor": 2}, PARAMETERS: {"rope_type": "default"}}), "rope_type"),
            (json!({PARAMETERS: {"full_attention": {"rope_type": "default"}}}), "full_attention"),
            (
                json!({PARAMETERS: {"rope_type": "default", "partial_rotary_factor": 0.5}}),
                "rope_parameters.partial_rotary_factor",
            ),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({PARAMETERS: 3}), "object"),
        ] {
            let refusal = take(config.clone()).map(|_| ()).unwrap_err();
            assert!(refusal.contains(part), "{config}: {refusal}");
        }
    }

    #[test]
    fn two_groups_of_settings_must_say_the_same() {
        let yarn = |more: Value| {
            let mut settings = json!({"rope_type": "yarn", "factor": 4});
            more.as_object().unwrap().iter().for_each(|(key, value)| settings[key] = value.clone());
            settings
        };
        let both = |new: Value, old: Value, theta: Value| {
            take(json!({PARAMETERS: yarn(new), SCALING: yarn(old), "rope_theta": theta}))
        };
        for (new, old) in [
            (json!({}), json!({"type": "yarn", "factor": 4.0})),
            (json!({"rope_theta": 5e5}), json!({})),
            (json!({"beta_fast": 16}), json!({"beta_fast": 16.0, "beta_slow": null})),
            (json!({}), json!({ORIGINAL: 2048, "low_freq_factor": 1})),
        ] {
            let settings = both(new.clone(), old.clone(), json!(5e5)).unwrap();
            assert!(settings.scaling.is_some() && settings.theta == Some(5e5), "{new} {old}");
        }
        for (new, old, key) in [
            (json!({"factor": 8}), json!({}), "factor"),
            (json!({"beta_fast": 16}), json!({"beta_fast": 24}), "beta_fast"),
            (json!({"beta_slow": 2}), json!({}), "beta_slow"),
            (json!({}), json!({"attention_factor": 1.5}), "attention_factor"),
            (json!({"truncate": false}), json!({"truncate": true}), "truncate"),
            (json!({ORIGINAL: 32}), json!({ORIGINAL: 64}), ORIGINAL),
            (json!({"low_freq_factor": 1}), json!({"low_freq_factor": 2}), "low_freq_factor"),
            (json!({"rope_theta": 1e4}), json!({"rope_theta": 2e4}), "rope_theta"),
            (json!({"rope_theta": 1e4}), json!({}), "rope_theta"),
        ] {
            let refusal = both(new.clone(), old.clone(), json!(5e5)).map(|_| ()).unwrap_err();
            for part in [format!("{PARAMETERS}.{key} is"), format!("{SCALING}.{key} is")] {
                assert!(refusal.contains(&part), "{new} {old}: {refusal}");
            }
        }
        // Without the key outside, the default of the family counts for the group that has none.
        assert!(both(json!({"rope_theta": 5e5}), json!({}), Value::Null).is_err());
        assert_eq!(both(json!({"rope_theta": 1e4}), json!({}), Value::Null).unwrap().theta, Some(1e4));
    }
}
