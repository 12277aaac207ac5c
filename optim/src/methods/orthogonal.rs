//! Options that the methods with orthogonal updates share.

use lowrank_kernels::newton_schulz::Coefficients;
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

/// Rejects numbers of Newton-Schulz steps for which there are no coefficients.
pub(crate) fn check_steps(steps: usize, coefficients: Coefficients) -> Result<(), OptimError> {
    match coefficients.sets() {
        Some(sets) if steps > sets => {
            check::refused("ns_steps", steps, format!("coefficients = varying has {sets} sets, one a step"))
        }
        _ => Ok(()),
    }
}
