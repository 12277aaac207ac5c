//! Errors of a whole run.

use std::path::PathBuf;

use super::checkpoint::CheckpointError;
use super::folder::RunFolderError;
use crate::build::BuildError;
use crate::engine::TrainError;

/// An error of a run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // each variant says whose error it carries
pub enum RunError {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint that was given is not as it was saved.
    #[error(transparent)]
    Damaged(CheckpointError),
    #[error(transparent)]
    Folder(#[from] RunFolderError),
    /// A run that was started with other settings.
    #[error(
        "{path} was begun with other settings:\n{differences}\na resumed run must give the same result; take these settings back, or start a new run with another --out"
    )]
    OtherSettings {
        /// The run.
        path: PathBuf,
        /// One line a setting.
        differences: String,
    },
    /// There is no checkpoint.
    #[error(
        "{path} has no checkpoint to resume from; start the run again with --overwrite in place of --resume, or choose another --out"
    )]
    NoCheckpoint {
        /// The run.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl RunError {
    /// Whether the cause is what was given (data, settings, files) rather than a failure while working.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Build(error) => error.is_input(),
            Self::Train(TrainError::Data(error)) => error.is_input(),
            Self::Train(TrainError::Model(error)) => error.is_input(),
            Self::Train(TrainError::Adapter(_)) => true,
            Self::Train(_) | Self::Checkpoint(_) | Self::System { .. } => false,
            Self::Folder(error) => !matches!(error, RunFolderError::Io { .. }),
            _ => true,
        }
    }
}
