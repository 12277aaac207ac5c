//! Errors of adapters.

use lowrank_optim::registry::{OptionError, UnknownName};

/// An error of an adapter.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// Unknown name of a structure or rule.
    #[error(transparent)]
    Unknown(#[from] UnknownName),
    /// Invalid option of a structure or rule.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// Setting outside its allowed range, or incompatible with another one.
    #[error("{key} = {value}: {reason}")]
    Setting {
        /// Setting, with its section.
        key: String,
        /// Value of the setting.
        value: String,
        /// Reason and remedy.
        reason: String,
    },
    /// Layer that the method does not support.
    #[error("{path} [{d_in}, {d_out}]: {reason}")]
    Place {
        /// Path of the layer.
        path: String,
        /// Number of inputs.
        d_in: usize,
        /// Number of outputs.
        d_out: usize,
        /// Reason for the rejection.
        reason: String,
    },
    /// No layer matches.
    #[error("no linear layer matches {what}; there are {known}")]
    NoMatch {
        /// Targets or pattern.
        what: String,
        /// Some existing layers.
        known: String,
    },
    /// Missing, unexpected or wrongly shaped tensor of an adapter.
    #[error("adapter tensor {tensor} of {path}: {reason}")]
    Tensor {
        /// Path of the layer.
        path: String,
        /// Name of the tensor.
        tensor: String,
        /// Reason for the rejection.
        reason: String,
    },
    /// Operation that this adapter does not support.
    #[error("{0}")]
    Refused(String),
    /// Several errors.
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
