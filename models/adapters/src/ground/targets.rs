//! Layers that an adapter is attached to, chosen as Python's `peft` does.

use std::fmt;

use regex::Regex;

use super::error::AdapterError;

/// Layers to adapt.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Targets {
    /// Every linear layer but the output head.
    #[default]
    AllLinear,
    /// Layers with these names, or whose paths end with `.` and one of them.
    Names(Vec<String>),
    /// Layers whose whole path matches a regular expression.
    Pattern(String),
}

/// Common names of a model's output head.
const HEADS: [&str; 6] = ["lm_head", "head", "output", "classifier", "score", "unembed"];

impl Targets {
    /// Parses a word or list of the command line: `all-linear`, names between commas, or a regular expression.
    pub fn parse(text: &str) -> Self {
        let is_name = |part: &str| part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        match text {
            "all-linear" => Self::AllLinear,
            text if text.split(',').all(is_name) => Self::Names(text.split(',').map(str::to_string).collect()),
            text => Self::Pattern(text.to_string()),
        }
    }

    /// Rejects an invalid regular expression.
    pub fn validate(&self) -> Result<(), AdapterError> {
        self.matcher().map(|_| ())
    }

    /// Splits a list into its single names.
    pub(crate) fn parts(&self) -> Vec<Self> {
        match self {
            Self::Names(names) => names.iter().map(|name| Self::Names(vec![name.clone()])).collect(),
            other => vec![other.clone()],
        }
    }

    pub(crate) fn matcher(&self) -> Result<Matcher<'_>, AdapterError> {
        Ok(match self {
            Self::AllLinear => Matcher::AllLinear,
            Self::Names(names) => Matcher::Names(names),
            Self::Pattern(pattern) => Matcher::Pattern(compiled(&format!("^(?:{pattern})$"), pattern)?),
        })
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllLinear => f.write_str("all-linear"),
            Self::Names(names) => f.write_str(&names.join(",")),
            Self::Pattern(pattern) => f.write_str(pattern),
        }
    }
}

pub(crate) enum Matcher<'a> {
    AllLinear,
    Names(&'a [String]),
    Pattern(Regex),
}

impl Matcher<'_> {
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::AllLinear => path.rsplit('.').next().is_none_or(|last| !HEADS.contains(&last)),
            Self::Names(names) => names.iter().any(|name| {
                path.strip_suffix(name.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.'))
            }),
            Self::Pattern(regex) => regex.is_match(path),
        }
    }
}

/// Pattern of `rank_pattern` or `alpha_pattern`: matches the whole path, or the part after one of its dots.
#[derive(Clone, Debug)]
pub struct NamePattern {
    /// Pattern as given.
    pub text: String,
    regex: Regex,
}

impl NamePattern {
    /// Compiles a pattern; rejects an invalid regular expression.
    pub fn new(text: &str) -> Result<Self, AdapterError> {
        Ok(Self { text: text.to_string(), regex: compiled(&format!(r"^(?:.*\.)?(?:{text})$"), text)? })
    }

    /// Returns true if a layer's path matches.
    pub fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path)
    }
}

fn compiled(pattern: &str, given: &str) -> Result<Regex, AdapterError> {
    Regex::new(pattern).map_err(|error| AdapterError::Setting {
        key: "adapter.targets".into(),
        value: given.into(),
        reason: match error.to_string() {
            text if text.contains("look-around") => {
                "look-ahead and look-behind are not supported; write the pattern without, or name the layers".into()
            }
            // The first lines repeat the expression.
            text => text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_string(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_whole_parts_and_patterns_whole_paths() {
        let matches = |targets: &str, path: &str| Targets::parse(targets).matcher().unwrap().matches(path);
        assert!(matches("q_proj,v_proj", "model.layers.0.self_attn.q_proj"));
        assert!(!matches("proj", "model.layers.0.self_attn.q_proj"));
        assert!(matches("self_attn.q_proj", "model.layers.0.self_attn.q_proj"));
        assert!(matches(r".*\.[01]\..*_proj", "model.layers.1.mlp.up_proj"));
        assert!(!matches(r"layers\.1", "model.layers.1.mlp.up_proj"));
        assert!(matches("all-linear", "model.layers.1.mlp.up_proj"));
        assert!(!matches("all-linear", "lm_head"));
        assert!(Targets::Pattern("(".into()).matcher().is_err());
    }

    #[test]
    fn rank_patterns_match_behind_a_dot() {
        let pattern = NamePattern::new("layers.1.self_attn.q_proj").unwrap();
        assert!(pattern.matches("model.layers.1.self_attn.q_proj"));
        assert!(!pattern.matches("model.mylayers.1.self_attn.q_proj"));
        assert!(!pattern.matches("model.layers.1.self_attn.q_proj.more"));
    }
}
