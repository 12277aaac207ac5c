//! Errors of a whole run.

use std::path::PathBuf;

use super::checkpoint::CheckpointError;
use super::folder::RunFolderError;
use crate::build::BuildError;
use crate::engine::TrainError;

/// Error of a run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // each variant says whose error it carries
pub enum RunError {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Damaged checkpoint that was given.
    #[error(transparent)]
    Damaged(CheckpointError),
    #[error(transparent)]
    Folder(#[from] RunFolderError),
    /// Run that was started with other settings.
    #[error(
        "{path} was begun with other settings:\n{differences}\na resumed run must give the same result; take these settings back, or start a new run with another --out"
    )]
    OtherSettings {
        /// Folder of the run.
        path: PathBuf,
        /// Differences, one line per setting.
        differences: String,
    },
    /// Processes that would not train the same model in the same way.
    #[error("the processes differ from rank 0:\n{differences}\ngive all of them the same program, files and settings")]
    OtherPeers {
        /// Differences, one line per process.
        differences: String,
    },
    /// Missing checkpoint.
    #[error(
        "{path} has no checkpoint to resume from; start the run again with --overwrite in place of --resume, or choose another --out"
    )]
    NoCheckpoint {
        /// Folder of the run.
        path: PathBuf,
    },
    /// Failure of a system operation.
    #[error("{what}: {source}")]
    System {
        /// Operation that was tried.
        what: String,
        /// Reason given by the system.
        source: std::io::Error,
    },
}

impl RunError {
    /// Returns true if the cause is the input (data, settings, files) rather than a failure while working.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Build(error) => error.is_input(),
            Self::Train(TrainError::Data(error)) => error.is_input(),
            Self::Train(TrainError::Model(error)) => error.is_input(),
            Self::Train(TrainError::Adapter(_) | TrainError::AllStates { .. }) => true,
            Self::Train(_) | Self::Checkpoint(_) | Self::System { .. } => false,
            Self::Folder(error) => !matches!(error, RunFolderError::Io { .. }),
            _ => true,
        }
    }
}
