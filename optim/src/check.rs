//! Checks of option values, each with its reason.

use crate::OptimError;

fn refuse(option: &'static str, value: impl ToString, reason: impl Into<String>) -> OptimError {
    OptimError::Value { option, value: value.to_string(), reason: reason.into() }
}

/// A refusal.
pub fn refused<T>(option: &'static str, value: impl ToString, reason: impl Into<String>) -> Result<T, OptimError> {
    Err(refuse(option, value, reason))
}

/// From 0 to below 1.
pub fn fraction(option: &'static str, value: f64) -> Result<(), OptimError> {
    match (0.0..1.0).contains(&value) {
        true => Ok(()),
        false => refused(option, value, "it must be from 0 to below 1"),
    }
}

/// From 0 to 1.
pub fn share(option: &'static str, value: f64) -> Result<(), OptimError> {
    match (0.0..=1.0).contains(&value) {
        true => Ok(()),
        false => refused(option, value, "it must be from 0 to 1"),
    }
}

/// Greater than 0 and finite.
pub fn positive(option: &'static str, value: f64) -> Result<(), OptimError> {
    match value > 0.0 && value.is_finite() {
        true => Ok(()),
        false => refused(option, value, "it must be greater than 0"),
    }
}

/// 0 or greater and finite.
pub fn not_negative(option: &'static str, value: f64) -> Result<(), OptimError> {
    match value >= 0.0 && value.is_finite() {
        true => Ok(()),
        false => refused(option, value, "it must be 0 or greater"),
    }
}

/// 1 or greater.
pub fn at_least_one(option: &'static str, value: usize) -> Result<(), OptimError> {
    match value > 0 {
        true => Ok(()),
        false => refused(option, value, "it must be at least 1"),
    }
}

/// What every Adam needs.
pub fn adam(beta_1: f64, beta_2: f64, epsilon: f64, weight_decay: f64) -> Result<(), OptimError> {
    fraction("beta_1", beta_1)?;
    fraction("beta_2", beta_2)?;
    positive("epsilon", epsilon)?;
    not_negative("weight_decay", weight_decay)
}
