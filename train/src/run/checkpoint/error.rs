//! What can go wrong with checkpoints.

use std::path::{Path, PathBuf};

/// An error of a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or folder that could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that is not what was saved.
    #[error("{path}: {reason}; the checkpoint cannot be used, take an earlier one")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An optimizer state that does not fit the optimizer.
    #[error("{path}: {reason}")]
    Optimizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The model's own files cannot be written.
    #[error(transparent)]
    Files(Box<dyn std::error::Error + Send + Sync>),
    /// A file of tensors that cannot be read.
    #[error(transparent)]
    Model(#[from] lowrank_models::ModelError),
}

impl CheckpointError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), reason: reason.into() }
    }
}
