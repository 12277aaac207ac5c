//! Errors of a configuration.

use std::fmt;
use std::path::PathBuf;

use lowrank_optim::registry::OptionError;

use super::Job;

/// Origin of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Default value.
    Default,
    /// Line of a file.
    File(PathBuf, usize),
    /// `--set`.
    Set,
    /// Flag of the command line.
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

/// Configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// File that cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Reason given by the system.
        source: std::io::Error,
    },
    /// File that is not valid TOML.
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
        /// Origin of the key.
        origin: Origin,
        /// Most similar key.
        nearest: Option<String>,
        /// Method that has such an option, and its options; boxed to keep errors small.
        method: Option<Box<(String, String)>>,
    },
    /// Key that belongs to another section.
    #[error("{origin}: there is no key {key}; write {to}")]
    Moved {
        /// The key.
        key: String,
        /// Origin of the key.
        origin: Origin,
        /// Key to use instead.
        to: String,
    },
    /// Key of another command.
    #[error("{key} ({origin}) is not supported in `lowrank {}`; remove it", job.name())]
    Elsewhere {
        /// The key.
        key: String,
        /// Origin of the key.
        origin: Origin,
        /// Kind of the run.
        job: Job,
    },
    /// Value that the key does not allow.
    #[error("{key} = {value} ({origin}): {reason}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// Origin of the value.
        origin: Origin,
        /// Allowed values.
        reason: String,
    },
    /// Incompatible options of a method.
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
