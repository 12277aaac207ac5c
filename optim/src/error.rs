//! Errors of optimizers and gradient rules.

use crate::registry::{OptionError, UnknownName};

/// An error of an optimizer's configuration or of a gradient.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OptimError {
    /// A method name that is not in the registry.
    #[error(transparent)]
    Name(#[from] UnknownName),
    /// An option that cannot be used.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// A gradient that is infinite or not a number.
    #[error("the gradient of {path} has {count} elements that are infinite or not a number")]
    NonFiniteGradient {
        /// Path of the first such parameter in the module.
        path: String,
        /// Number of such elements.
        count: u64,
    },
    /// A module without LoRA adapters.
    #[error("the module has no LoRA adapter; attach one first")]
    NoAdapter,
    /// A gradient of one factor of a pair alone, where both are needed.
    #[error(
        "the LoRA adapter of {path} has a gradient for {present} and none for {missing}: the rule needs both; train both, or take another rule"
    )]
    LoneFactor {
        /// Path of the layer.
        path: String,
        /// The factor with a gradient.
        present: &'static str,
        /// The factor without a gradient.
        missing: &'static str,
    },
    /// A module without matrices for a low-rank optimizer.
    #[error("no hidden matrix for the optimizer; the parameters are {paths}; patterns (include) can name them")]
    NothingToProject {
        /// Some of the parameters.
        paths: String,
    },
    /// A rank above the projected side of every matrix.
    #[error(
        "the rank is larger than the projected side of every hidden matrix, of which {} x {} is the largest; lower it", .largest[0], .largest[1]
    )]
    NothingFits {
        /// Rows and columns of the largest matrix.
        largest: [usize; 2],
    },
}
