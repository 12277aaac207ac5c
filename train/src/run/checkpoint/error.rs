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
    #[error("{path}: {reason}; the checkpoint is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A checkpoint of another version of the program.
    #[error(
        "{path}: the checkpoint has format version {found} and was written by lowrank {program}; this program reads version {known}. Resume with the program that wrote it"
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version that this program reads.
        known: u32,
        /// Version of the program that wrote it.
        program: String,
    },
    /// The newest checkpoint cannot be used. It stays as it is.
    #[error("{reason}\nit is the newest checkpoint and stays as it is; {cure}")]
    Newest {
        /// The checkpoint.
        path: PathBuf,
        /// The reason.
        reason: Box<CheckpointError>,
        /// The way out.
        cure: String,
    },
    /// No checkpoint has this name.
    #[error("--resume-from {name}: there is no such checkpoint in {dir}; {known}")]
    Unknown {
        /// The name.
        name: String,
        /// Folder of the checkpoints.
        dir: PathBuf,
        /// Those that exist.
        known: String,
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
