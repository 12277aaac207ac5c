//! Errors of building the parts of a run.

use lowrank_models::ModelError;
use lowrank_models::adapter::AdapterError;
use lowrank_optim::OptimError;
use lowrank_optim::registry::OptionError;

use crate::config::ConfigError;
use crate::data::DataError;
use crate::process::DeviceError;

/// Configuration that no run can be built from, or files that do not allow it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // each variant says whose error it carries
pub enum BuildError {
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
    Option(#[from] OptionError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Incompatible settings.
    #[error("{0}")]
    Settings(String),
}

impl BuildError {
    /// Returns true if the cause is the input (data, settings, files) rather than a failure while working.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Data(error) => error.is_input(),
            Self::Model(error) => error.is_input(),
            _ => true,
        }
    }
}
