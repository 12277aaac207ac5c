//! Errors of models and their files.

use std::path::PathBuf;

use lowrank_adapters::AdapterError;
use lowrank_adapters::compose::ComposeError;
use lowrank_optim::registry::{OptionError, UnknownName};

/// An error of a model, its configuration or its files.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A shape name that is not in the list.
    #[error("no model shape is named \"{name}\"; known names: {known}")]
    UnknownShape {
        /// The name asked for.
        name: String,
        /// All known names.
        known: String,
    },
    /// A name that is not in the list.
    #[error(transparent)]
    Name(#[from] UnknownName),
    /// An option that cannot be used.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// A configuration that no model can have.
    #[error("model configuration: {0}")]
    Config(String),
    /// A file or folder that could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file with invalid content.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// The problem and its cure.
        reason: String,
    },
    /// A tensor that is missing, left over, of another shape or of a type that cannot be read.
    #[error("{path}: tensor {tensor}: {reason}")]
    Tensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The problem.
        reason: String,
    },
    /// A model with an adapter where weights alone are expected.
    #[error(
        "{path} has an adapter, which cannot be stored in a model folder: merge it first, or save the adapter by itself"
    )]
    Adapted {
        /// The first such weight.
        path: String,
    },
    /// An error of an adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// An error of a composition of adapters.
    #[error(transparent)]
    Compose(#[from] ComposeError),
    /// A sampling setting outside its range.
    #[error("generation: {0}")]
    Sampling(String),
    /// Outputs that are not finite, from which no token can be chosen.
    #[error("token {token} cannot be chosen: the output for id {id} is {value}; the weights are damaged or too large")]
    NotFinite {
        /// Number of the new token, from 1.
        token: usize,
        /// The first id with such an output.
        id: usize,
        /// The output.
        value: f32,
    },
    /// Token ids the model has no embedding for.
    #[error("token id {id} at position {position} is outside the model's vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: i64,
        /// Position in the sequence.
        position: usize,
        /// The number of ids the model knows.
        vocab_size: usize,
    },
}

impl ModelError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Returns true if the cause is an input (a file, a setting) rather than the machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Io { source, .. } => matches!(
                source.kind(),
                std::io::ErrorKind::NotFound
                    | std::io::ErrorKind::NotADirectory
                    | std::io::ErrorKind::IsADirectory
                    | std::io::ErrorKind::InvalidData
                    | std::io::ErrorKind::UnexpectedEof
            ),
            Self::NotFinite { .. } => false,
            _ => true,
        }
    }
}
