//! `generation_config.json`: what a model's makers recommend for continuing texts.

use std::path::Path;

use serde_json::{Map, Value};

use super::companions::companion;
use super::keys::ids;
use crate::error::ModelError;
use crate::llama::Sampling;

/// Name of the settings of generation.
pub(super) const GENERATION: &str = "generation_config.json";

/// Settings of a `generation_config.json`; none for those that it does not have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// Ids that end a text.
    pub ends: Vec<u32>,
    /// Divisor of the logits.
    pub temperature: Option<f64>,
    /// Number of most likely tokens to keep.
    pub top_k: Option<usize>,
    /// Sum of the probabilities to keep.
    pub top_p: Option<f64>,
    /// Divisor of the logits of tokens that have occurred.
    pub repetition_penalty: Option<f64>,
    /// Settings that would change the choice of tokens and are not followed.
    pub others: Vec<String>,
}

/// Settings that are not followed, with the values that change nothing.
const OTHERS: [(&str, f64); 9] = [
    ("min_p", 0.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("min_new_tokens", 0.0),
];

impl Generation {
    /// Reads the settings beside a model; those of a GGUF file are in its metadata. A setting outside its range is rejected.
    pub fn read(model: &Path) -> Result<Self, ModelError> {
        let Some(bytes) = companion(model, GENERATION)? else { return Ok(Self::default()) };
        Self::parse(&bytes).map_err(|reason| ModelError::File { path: model.join(GENERATION), reason })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| format!("not a JSON object: {error}"))?;
        let given = |key: &str| map.get(key).filter(|value| !value.is_null());
        let number = |key: &str| match given(key) {
            None => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| format!("{key} is {value}; it must be a number")),
        };
        let top_k = match given("top_k") {
            None => None,
            Some(value) => {
                let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
                Some(count.ok_or_else(|| format!("top_k is {value}; it must be a whole number"))?)
            }
        };
        let differs = |(key, neutral): &(&str, f64)| given(key).is_some_and(|value| value.as_f64() != Some(*neutral));
        let settings = Self {
            ends: ids(map.get("eos_token_id")),
            temperature: number("temperature")?,
            top_k,
            top_p: number("top_p")?,
            repetition_penalty: number("repetition_penalty")?,
            others: OTHERS.iter().filter(|other| differs(other)).map(|(key, _)| key.to_string()).collect(),
        };
        settings.over(Sampling::default()).validate().map_err(|error| error.to_string())?;
        Ok(settings)
    }

    /// These settings, where there are any, in place of others.
    pub fn over(&self, usual: Sampling) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(usual.temperature),
            top_k: self.top_k.unwrap_or(usual.top_k),
            top_p: self.top_p.unwrap_or(usual.top_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(usual.repetition_penalty),
            seed: usual.seed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_stand_over_the_usual_ones_and_others_are_named() {
        let text =
            br#"{"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "min_p": 0.05,
            "num_beams": 1, "do_sample": true}"#;
        let settings = Generation::parse(text).unwrap();
        assert_eq!(
            (settings.ends.as_slice(), settings.others.as_slice()),
            ([2, 5].as_slice(), ["min_p".into()].as_slice())
        );
        let sampling = settings.over(Sampling { seed: 7, ..Sampling::default() });
        let expected = Sampling { temperature: 0.6, top_k: 50, top_p: 0.9, repetition_penalty: 1.1, seed: 7 };
        assert_eq!(sampling, expected);
        assert_eq!(Generation::parse(b"{}").unwrap(), Generation::default());
    }

    #[test]
    fn settings_outside_their_range_are_refused_by_name() {
        for (text, part) in [
            ("[", "JSON"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"temperature": -1}"#, "temperature"),
            (r#"{"top_k": 2.5}"#, "top_k"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
        ] {
            let refusal = Generation::parse(text.as_bytes()).unwrap_err();
            assert!(refusal.contains(part), "{refusal}");
        }
    }
}
