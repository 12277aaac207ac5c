//! Errors of checkpoints.

use std::path::{Path, PathBuf};

/// Error of a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// File or folder that could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Reason given by the system.
        source: std::io::Error,
    },
    /// File that differs from the saved one.
    #[error("{path}: {reason}; the checkpoint is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Problem with the file.
        reason: String,
    },
    /// Checkpoint of another version of the program.
    #[error(
        "{path}: the checkpoint has format version {found} and was written by lowrank {program}; this program reads version {known}. Resume with the program that wrote it"
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Format version of the checkpoint.
        found: u32,
        /// Format version that this program reads.
        known: u32,
        /// Version of the program that wrote it.
        program: String,
    },
    /// Unusable newest checkpoint, which is left as it is.
    #[error("{reason}\nit is the newest checkpoint and stays as it is; {cure}")]
    Newest {
        /// The checkpoint.
        path: PathBuf,
        /// The reason.
        reason: Box<CheckpointError>,
        /// Remedy.
        cure: String,
    },
    /// Unknown name of a checkpoint.
    #[error("--resume-from {name}: there is no such checkpoint in {dir}; {known}")]
    Unknown {
        /// The name.
        name: String,
        /// Folder of the checkpoints.
        dir: PathBuf,
        /// Existing checkpoints.
        known: String,
    },
    /// Optimizer state that does not fit the optimizer.
    #[error("{path}: {reason}")]
    Optimizer {
        /// The file.
        path: PathBuf,
        /// Problem with the file.
        reason: String,
    },
    /// Failure to write the model's own files.
    #[error(transparent)]
    Files(Box<dyn std::error::Error + Send + Sync>),
    /// Unreadable file of tensors.
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
