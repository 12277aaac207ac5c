//! Rejections that depend on several options; the allowed values of a single option are stated at its field.

use crate::error::OptimError;
use crate::registry::options::OptionError;

/// A rejected value with its reason.
pub fn refused<T>(option: &str, value: impl ToString, reason: impl Into<String>) -> Result<T, OptimError> {
    Err(OptionError::value(option, value.to_string(), reason).into())
}
