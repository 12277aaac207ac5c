//! Options of Adam, which most optimizers share.

use burn::config::Config;
use schemars::JsonSchema;

/// Options of Adam with decoupled weight decay.
#[derive(Config, Copy, Debug, PartialEq, JsonSchema)]
pub struct AdamOptions {
    /// Decay of the first moment (the paper's beta_1).
    #[config(default = 0.9)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub beta_1: f64,
    /// Decay of the second moment (the paper's beta_2).
    #[config(default = 0.999)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub beta_2: f64,
    /// Added to the root of the second moment.
    #[config(default = 1e-8)]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub epsilon: f64,
    /// Decoupled weight decay of matrices.
    #[config(default = 0.0)]
    #[schemars(range(min = 0.0, max = 1e3))]
    pub weight_decay: f64,
}

/// Gives a configuration with a field `adam: AdamOptions` the builders of its options.
macro_rules! adam_builders {
    ($config:ident) => {
        impl $config {
            /// With this decay of the first moment.
            pub fn with_beta_1(mut self, beta_1: f64) -> Self {
                self.adam.beta_1 = beta_1;
                self
            }

            /// With this decay of the second moment.
            pub fn with_beta_2(mut self, beta_2: f64) -> Self {
                self.adam.beta_2 = beta_2;
                self
            }

            /// With this constant added to the root of the second moment.
            pub fn with_epsilon(mut self, epsilon: f64) -> Self {
                self.adam.epsilon = epsilon;
                self
            }

            /// With this decoupled weight decay.
            pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
                self.adam.weight_decay = weight_decay;
                self
            }
        }
    };
}
pub(crate) use adam_builders;
