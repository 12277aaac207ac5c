//! Options that the methods with orthogonal updates share.

use burn::config::Config;
use burn::tensor::Tensor;
use lowrank_kernels::newton_schulz::{Coefficients, newton_schulz};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::check;
use crate::error::OptimError;

/// Scale of the update of a matrix of `d_out` outputs and `d_in` inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// `sqrt(max(1, d_out / d_in))`.
    Kj,
    /// `sqrt(d_out / d_in)`.
    Spectral,
    /// `0.2 sqrt(max(d_out, d_in))`, which allows learning rates of AdamW.
    Rms,
    /// 1.
    None,
}

impl Scaling {
    /// The factor for a matrix of this shape; Burn's linear layers store `[d_in, d_out]`, PyTorch's `[d_out, d_in]`.
    pub fn factor(self, [rows, columns]: [usize; 2], rows_are_outputs: bool) -> f64 {
        let (outputs, inputs) = if rows_are_outputs { (rows, columns) } else { (columns, rows) };
        let ratio = outputs as f64 / inputs as f64;
        match self {
            Self::Kj => ratio.max(1.0).sqrt(),
            Self::Spectral => ratio.sqrt(),
            Self::Rms => 0.2 * (outputs.max(inputs) as f64).sqrt(),
            Self::None => 1.0,
        }
    }
}

/// Options of the Newton-Schulz iteration.
#[derive(Config, Copy, Debug, PartialEq, JsonSchema)]
pub struct NewtonSchulzOptions {
    /// Newton-Schulz steps.
    #[config(default = 5)]
    #[schemars(range(min = 1, max = 100))]
    pub ns_steps: usize,
    /// Coefficients of the Newton-Schulz iteration.
    #[config(default = "Coefficients::Jordan")]
    pub coefficients: Coefficients,
    /// Compute the iteration's products in bf16, as in the published code.
    #[config(default = false)]
    pub ns_bf16: bool,
}

impl NewtonSchulzOptions {
    /// The orthogonal factor of a matrix, approximately.
    pub fn orthogonal(&self, x: Tensor<2>) -> Tensor<2> {
        newton_schulz(x, self.ns_steps, self.coefficients, self.ns_bf16)
    }

    /// Rejects numbers of steps for which there are no coefficients.
    pub(crate) fn validate(&self) -> Result<(), OptimError> {
        match self.coefficients.sets() {
            Some(sets) if self.ns_steps > sets => {
                check::refused("ns_steps", self.ns_steps, format!("coefficients = varying has {sets} sets, one a step"))
            }
            _ => Ok(()),
        }
    }
}

/// Options of an orthogonal update of a matrix, and of its companion AdamW.
#[derive(Config, Copy, Debug, PartialEq, JsonSchema)]
pub struct OrthogonalOptions {
    /// Scale of the update by the shape of the matrix.
    #[config(default = "Scaling::Kj")]
    pub scaling: Scaling,
    /// Matrices are stored `[d_out, d_in]`; Burn's are not.
    #[config(default = false)]
    pub rows_are_outputs: bool,
    /// Learning rate of all other parameters as a multiple of that of the matrices.
    #[config(default = 0.015)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub others_lr_scale: f64,
}

impl OrthogonalOptions {
    /// Scale of the update of a matrix of this shape.
    pub fn factor(&self, shape: [usize; 2]) -> f64 {
        self.scaling.factor(shape, self.rows_are_outputs)
    }
}

/// Gives a configuration with a field `iteration: NewtonSchulzOptions` the builders of its options.
macro_rules! newton_schulz_builders {
    ($config:ident) => {
        impl $config {
            /// With this number of Newton-Schulz steps.
            pub fn with_ns_steps(mut self, ns_steps: usize) -> Self {
                self.iteration.ns_steps = ns_steps;
                self
            }

            /// With these coefficients of the Newton-Schulz iteration.
            pub fn with_coefficients(mut self, coefficients: Coefficients) -> Self {
                self.iteration.coefficients = coefficients;
                self
            }

            /// With the iteration's products in bf16, or in f32.
            pub fn with_ns_bf16(mut self, ns_bf16: bool) -> Self {
                self.iteration.ns_bf16 = ns_bf16;
                self
            }
        }
    };
}
pub(crate) use newton_schulz_builders;
