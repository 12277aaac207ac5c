//! What can go wrong in a whole run.

use std::path::PathBuf;

use lowrank_models::ModelError;
use lowrank_models::adapter::AdapterError;
use lowrank_optim::OptimError;

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::engine::TrainError;
use crate::run::RunFolderError;

/// An error of a run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // each variant says whose error it carries
pub enum JobError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Optim(#[from] OptimError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint that was given is not as it was saved.
    #[error(transparent)]
    Damaged(CheckpointError),
    #[error(transparent)]
    Folder(#[from] RunFolderError),
    /// A device that does not exist or that this build does not know.
    #[error("train.device = \"{name}\": {reason}")]
    Device {
        /// The name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Two settings that do not go together.
    #[error("{0}")]
    Settings(String),
    /// A run that was begun with other settings.
    #[error(
        "{path} was begun with other settings:\n{differences}\na resumed run must give the same result; take these settings back, or start a new run with another --out"
    )]
    OtherSettings {
        /// The run.
        path: PathBuf,
        /// One line a setting.
        differences: String,
    },
    /// No checkpoint can be used.
    #[error("{path} has no checkpoint to resume from{reasons}")]
    NoCheckpoint {
        /// The run.
        path: PathBuf,
        /// Why those that exist cannot be used.
        reasons: String,
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

impl JobError {
    /// Whether the cause is what was given (data, settings, files) rather than a failure while working.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Data(error) | Self::Train(TrainError::Data(error)) => error.is_input(),
            Self::Model(error) | Self::Train(TrainError::Model(error)) => error.is_input(),
            Self::Train(TrainError::Adapter(_)) => true,
            Self::Train(_) | Self::Checkpoint(_) | Self::System { .. } => false,
            Self::Folder(error) => !matches!(error, RunFolderError::Io { .. }),
            _ => true,
        }
    }
}
