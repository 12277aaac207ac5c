//! Errors of a configuration.

use std::fmt;
use std::path::PathBuf;

use lowrank_optim::registry::OptionError;

use super::Job;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The defaults.
    Default,
    /// A line of a file.
    File(PathBuf, usize),
    /// `--set`.
    Set,
    /// A flag of its own.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{} line {line}", path.display()),
            Self::Set => f.write_str("--set"),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{path}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's message with the line.
        message: String,
    },
    /// `--set` without an equals sign.
    #[error("--set {0}: write it as section.key=value")]
    Assignment(String),
    /// A key that does not exist.
    #[error("{origin}: there is no key {key}{}{}", did_you_mean(nearest), of(method))]
    Unknown {
        /// The key.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// The most similar key.
        nearest: Option<String>,
        /// The method whose option it would be, and its options; boxed, since errors travel through many results.
        method: Option<Box<(String, String)>>,
    },
    /// A key that is written elsewhere.
    #[error("{origin}: there is no key {key}; write {to}")]
    Moved {
        /// The key.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// The key to write.
        to: String,
    },
    /// A key of another command.
    #[error("{key} ({origin}) is not supported in `lowrank {}`; remove it", job.name())]
    Elsewhere {
        /// The key.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// What the run does.
        job: Job,
    },
    /// A value that the key does not allow.
    #[error("{key} = {value} ({origin}): {reason}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// Where it came from.
        origin: Origin,
        /// What is allowed.
        reason: String,
    },
    /// Options of a method that do not go together.
    #[error(transparent)]
    Option(#[from] OptionError),
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|near| format!("; did you mean {near}?")).unwrap_or_default()
}

fn of(method: &Option<Box<(String, String)>>) -> String {
    match method.as_deref() {
        Some((name, options)) if options.is_empty() => format!("; {name} has no options"),
        Some((name, options)) => format!("; options of {name}: {options}"),
        None => String::new(),
    }
}
