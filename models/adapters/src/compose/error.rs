//! Errors of compositions.

use lowrank_optim::registry::{OptionError, UnknownName};

use crate::ground::error::AdapterError;

/// An error of a composition.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// Unknown name of a composition.
    #[error(transparent)]
    Unknown(#[from] UnknownName),
    /// Invalid option of a composition.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// Error of one of the adapters.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A source whose update of a layer cannot be used.
    #[error("adapter {adapter}, layer {layer}: {reason}")]
    Source {
        /// Name of the source.
        adapter: String,
        /// Path of the layer.
        layer: String,
        /// Problem and remedy.
        reason: String,
    },
    /// Sources that cannot be composed at a layer.
    #[error("layer {layer}: {reason}")]
    Layer {
        /// Path of the layer.
        layer: String,
        /// Problem and remedy.
        reason: String,
    },
    /// Sources that cannot be composed at all.
    #[error("{0}")]
    Sources(String),
}
