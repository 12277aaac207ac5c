//! Layers that an adapter is attached to, chosen as Python's `peft` does.

use std::fmt;

use fancy_regex::Regex;

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
        self.matcher("adapter.targets").map(|_| ())
    }

    /// Splits a list into its single names.
    pub(crate) fn parts(&self) -> Vec<Self> {
        match self {
            Self::Names(names) => names.iter().map(|name| Self::Names(vec![name.clone()])).collect(),
            other => vec![other.clone()],
        }
    }

    /// The targets to compare with; `key` is the setting that an error names.
    pub(crate) fn matcher(&self, key: &str) -> Result<Matcher<'_>, AdapterError> {
        Ok(match self {
            Self::AllLinear => Matcher::AllLinear,
            Self::Names(names) => Matcher::Names(names),
            Self::Pattern(pattern) => Matcher::Pattern(Expression::new(&format!("^(?:{pattern})$"), pattern, key)?),
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
    Pattern(Expression),
}

impl Matcher<'_> {
    pub fn matches(&self, path: &str) -> Result<bool, AdapterError> {
        Ok(match self {
            Self::AllLinear => path.rsplit('.').next().is_none_or(|last| !HEADS.contains(&last)),
            Self::Names(names) => names.iter().any(|name| {
                path.strip_suffix(name.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.'))
            }),
            Self::Pattern(expression) => expression.matches(path)?,
        })
    }
}

/// Pattern of `rank_pattern` or `alpha_pattern`: matches the whole path, or the part after one of its dots.
#[derive(Clone, Debug)]
pub struct NamePattern {
    /// Pattern as given.
    pub text: String,
    expression: Expression,
}

impl NamePattern {
    /// Compiles a pattern of a setting; rejects an invalid regular expression.
    pub fn new(text: &str, key: &str) -> Result<Self, AdapterError> {
        let expression = Expression::new(&format!(r"^(?:.*\.)?(?:{text})$"), text, key)?;
        Ok(Self { text: text.to_string(), expression })
    }

    /// Returns true if a layer's path matches. An expression that would have to be tried in too many ways is an error.
    pub fn matches(&self, path: &str) -> Result<bool, AdapterError> {
        self.expression.matches(path)
    }

    /// The first of some paths that matches.
    pub fn find<'a>(&self, paths: impl IntoIterator<Item = &'a String>) -> Result<Option<&'a String>, AdapterError> {
        for path in paths {
            if self.matches(path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

/// A regular expression with what Python's have: look-ahead, look-behind, references.
#[derive(Clone, Debug)]
pub(crate) struct Expression {
    regex: Regex,
    /// Setting and value that an error names.
    given: [String; 2],
}

impl Expression {
    /// Compiles an expression made of what was given for a setting.
    pub fn new(expression: &str, given: &str, key: &str) -> Result<Self, AdapterError> {
        let given = [key.to_string(), given.to_string()];
        match Regex::new(expression) {
            Ok(regex) => Ok(Self { regex, given }),
            Err(error) => {
                // Places in what was given, if that is the reason.
                let error = Regex::new(&given[1]).err().unwrap_or(error).to_string();
                // The first lines of some repeat the expression.
                let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
                Err(refused(&given, &format!("not a regular expression: {reason}")))
            }
        }
    }

    pub fn matches(&self, text: &str) -> Result<bool, AdapterError> {
        self.regex.is_match(text).map_err(|error| refused(&self.given, &error.to_string()))
    }
}

fn refused([key, value]: &[String; 2], reason: &str) -> AdapterError {
    AdapterError::Setting { key: key.clone(), value: value.clone(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_whole_parts_and_patterns_whole_paths() {
        let matches = |targets: &str, path: &str| {
            Targets::parse(targets).matcher("adapter.targets").unwrap().matches(path).unwrap()
        };
        assert!(matches("q_proj,v_proj", "model.layers.0.self_attn.q_proj"));
        assert!(!matches("proj", "model.layers.0.self_attn.q_proj"));
        assert!(matches("self_attn.q_proj", "model.layers.0.self_attn.q_proj"));
        assert!(matches(r".*\.[01]\..*_proj", "model.layers.1.mlp.up_proj"));
        assert!(!matches(r"layers\.1", "model.layers.1.mlp.up_proj"));
        assert!(matches("all-linear", "model.layers.1.mlp.up_proj"));
        assert!(!matches("all-linear", "lm_head"));
        assert!(matches(r".*layers\.(?!0\b)\d+\..*_proj", "model.layers.1.mlp.up_proj"));
        assert!(!matches(r".*layers\.(?!0\b)\d+\..*_proj", "model.layers.0.mlp.up_proj"));
        assert!(Targets::Pattern("(".into()).validate().is_err());
    }

    #[test]
    fn rank_patterns_match_behind_a_dot() {
        let matches = |text: &str, path: &str| NamePattern::new(text, "rank_pattern").unwrap().matches(path).unwrap();
        let text = "layers.1.self_attn.q_proj";
        assert!(matches(text, "model.layers.1.self_attn.q_proj"));
        assert!(!matches(text, "model.mylayers.1.self_attn.q_proj"));
        assert!(!matches(text, "model.layers.1.self_attn.q_proj.more"));
        assert!(matches(r"layers\.(?!0\b).*q_proj", "model.layers.1.self_attn.q_proj"));
        assert!(!matches(r"layers\.(?!0\b).*q_proj", "model.layers.0.self_attn.q_proj"));
    }

    #[test]
    fn an_expression_that_is_invalid_or_does_not_end_is_refused_by_the_name_of_its_setting() {
        let invalid = NamePattern::new("(?<", "rank_pattern").unwrap_err().to_string();
        assert!(invalid.starts_with("rank_pattern = (?<: not a regular expression: "), "{invalid}");
        let endless = NamePattern::new(r"(a|a|aa)*(?=b)c", "alpha_pattern").unwrap();
        let error = endless.matches(&"a".repeat(60)).unwrap_err().to_string();
        assert!(error.starts_with("alpha_pattern = (a|a|aa)*(?=b)c: "), "{error}");
    }
}
