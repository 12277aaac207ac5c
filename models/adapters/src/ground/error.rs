//! Errors of adapters.

use lowrank_optim::registry::{OptionError, UnknownName};

/// An error of an adapter.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A name that no structure or rule has.
    #[error(transparent)]
    Unknown(#[from] UnknownName),
    /// An option of a structure or rule that cannot be used.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// A setting outside what it allows, or that does not go together with another.
    #[error("{key} = {value}: {reason}")]
    Setting {
        /// The setting, with its section.
        key: String,
        /// Its value.
        value: String,
        /// Reason and cure.
        reason: String,
    },
    /// A layer that the method has no meaning for.
    #[error("{path} [{d_in}, {d_out}]: {reason}")]
    Place {
        /// The layer.
        path: String,
        /// Its inputs.
        d_in: usize,
        /// Its outputs.
        d_out: usize,
        /// Reason.
        reason: String,
    },
    /// No layer matches.
    #[error("no linear layer matches {what}; there are {known}")]
    NoMatch {
        /// The targets or pattern.
        what: String,
        /// Some layers that exist.
        known: String,
    },
    /// A tensor of an adapter that is missing, left over or of another shape.
    #[error("adapter tensor {tensor} of {path}: {reason}")]
    Tensor {
        /// The layer.
        path: String,
        /// The tensor.
        tensor: String,
        /// Reason.
        reason: String,
    },
    /// An operation that this adapter does not support.
    #[error("{0}")]
    Refused(String),
    /// More than one of these.
    #[error("{}", listed(.0))]
    Several(Vec<AdapterError>),
}

fn listed(errors: &[AdapterError]) -> String {
    const SHOWN: usize = 6;
    let mut text = errors.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if errors.len() > SHOWN {
        text.push_str(&format!("; and {} more", errors.len() - SHOWN));
    }
    text
}
