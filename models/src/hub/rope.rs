//! Rotary settings in `config.json`, in the spelling of any version of `transformers`.

use serde_json::{Map, Value, json};

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
    /// Takes the settings out of a configuration. Unknown keys that would change the computation are rejected by name.
    ///
    /// `positions` are those of a model whose configuration does not say how many it has.
    pub fn take(map: &mut Map<String, Value>, positions: usize) -> Result<Self, String> {
        let mut object = |key: &str| match map.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(settings)) if settings.is_empty() => Ok(None),
            Some(Value::Object(settings)) => Ok(Some(settings)),
            Some(other) => Err(format!("{key} is {other}; it must be an object")),
        };
        let (new, old) = (object(PARAMETERS)?, object(SCALING)?);
        let (place, mut settings) = match (new, old) {
            (Some(new), Some(old)) if kind(&new) != kind(&old) || new.get("factor") != old.get("factor") => {
                return Err(format!("{PARAMETERS} and {SCALING} say different things; keep one of them"));
            }
            (Some(new), _) => (PARAMETERS, new),
            (None, Some(old)) => (SCALING, old),
            (None, None) => return Self::partial(map, "", &mut Map::new()).map(|()| Self::default()),
        };
        Self::partial(map, place, &mut settings)?;
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
        let known = |keys: &[&str]| {
            let strange =
                settings.keys().find(|key| !keys.contains(&key.as_str()) && !PASSED_OVER.contains(&key.as_str()));
            match strange {
                None => Ok(()),
                Some(key) => Err(format!("{place}.{key} is {}; this setting is not known", settings[key])),
            }
        };
        if !KINDS.contains(&kind.as_str()) {
            return Err(format!("{place}.rope_type is \"{kind}\"; {} can be read", KINDS.join(", ")));
        }
        known(&[])?;
        if kind == "default" {
            return Ok(Self { theta, scaling: None });
        }
        if ["llama3", "yarn"].contains(&kind.as_str()) {
            let positions = map.get("max_position_embeddings").cloned().unwrap_or(json!(positions));
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

    /// Rejects angles for a part of each head.
    fn partial(map: &mut Map<String, Value>, place: &str, settings: &mut Map<String, Value>) -> Result<(), String> {
        const KEY: &str = "partial_rotary_factor";
        for (place, value) in [("", map.remove(KEY)), (place, settings.remove(KEY))] {
            if let Some(value) = value
                && !value.is_null()
                && value.as_f64() != Some(1.0)
            {
                let dot = if place.is_empty() { "" } else { "." };
                return Err(format!("{place}{dot}{KEY} is {value}; only 1 is supported"));
            }
        }
        Ok(())
    }
}

/// The kind that settings name, under the newer key first.
fn kind(settings: &Map<String, Value>) -> String {
    let named = ["rope_type", "type"].into_iter().find_map(|key| settings.get(key).filter(|kind| !kind.is_null()));
    named.map_or("default".into(), |kind| kind.as_str().map_or(kind.to_string(), str::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(value: Value) -> Result<Settings, String> {
        let Value::Object(mut map) = value else { unreachable!("it is an object") };
        let settings = Settings::take(&mut map, 2048)?;
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
            (json!({SCALING: {"type": "linear", "factor": 2}, PARAMETERS: {"rope_type": "default"}}), "different"),
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
}
