//! What can go wrong with optimizers and gradient rules.

/// An error of an optimizer's configuration or of a gradient.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OptimError {
    /// A method name that is not in the registry.
    #[error("no optimizer is named \"{name}\"{}; known: {known}", nearest.as_ref().map(|n| format!(" (did you mean \"{n}\"?)")).unwrap_or_default())]
    UnknownMethod {
        /// The name asked for.
        name: String,
        /// The most similar known name.
        nearest: Option<String>,
        /// All known names.
        known: String,
    },
    /// An option that the method does not have.
    #[error("{method} has no option \"{option}\"{}; its options: {known}", nearest.as_ref().map(|n| format!(" (did you mean \"{n}\"?)")).unwrap_or_default())]
    UnknownOption {
        /// The method.
        method: String,
        /// The option asked for.
        option: String,
        /// The most similar option of the method.
        nearest: Option<String>,
        /// All options of the method.
        known: String,
    },
    /// A value outside what the option allows.
    #[error("{option} is {value}: {reason}")]
    Value {
        /// The option.
        option: &'static str,
        /// The value given.
        value: String,
        /// What is allowed, or why not this.
        reason: String,
    },
    /// A gradient that is infinite or not a number.
    #[error("the gradient of {path} has {count} values that are infinite or not a number")]
    NonFiniteGradient {
        /// Path of the first such parameter in the module.
        path: String,
        /// How many values of that gradient.
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
        /// The factor without.
        missing: &'static str,
    },
    /// A module without matrices for a low-rank optimizer.
    #[error("no hidden matrix for the optimizer; the parameters are {paths}; patterns (include) can name them")]
    NothingToProject {
        /// Some of the parameters.
        paths: String,
    },
    /// A rank above the projected side of every matrix.
    #[error("the rank is larger than the projected side of every hidden matrix (the largest is {shapes}); lower it")]
    NothingFits {
        /// The largest matrix.
        shapes: String,
    },
}
