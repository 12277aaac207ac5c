//! State of a projected optimizer.

use burn::optim::RecordState;
use burn::tensor::{Device, Tensor};

use crate::projected::subspace::Subspace;
use crate::state::error_feedback::ErrorBuffer;
use crate::state::moments::Moment;

/// State of a projected optimizer for one matrix.
#[derive(Clone, Debug, RecordState)]
pub struct ProjectedState {
    /// Steps taken.
    pub time: usize,
    /// Steps since the moments last started at 0.
    pub moment_time: usize,
    /// Renewals of the subspace.
    pub renewals: u64,
    /// Steps between renewals.
    pub gap: usize,
    /// Key of the matrix's random draws.
    pub key: u64,
    /// Number of the matrix among those of its optimizer.
    pub number: usize,
    /// Number of matrices; 0 if unknown.
    pub count: usize,
    /// Subspace of the matrix.
    pub subspace: Option<Subspace>,
    /// Moving average of the low-rank gradient.
    pub moment_1: Option<Moment<2>>,
    /// Moving average of its square.
    pub moment_2: Option<Moment<2>>,
    /// Residual of the projection, added at the next step.
    pub error: Option<ErrorBuffer>,
    /// Norm of the scaled part at the last step, for its limit of growth.
    pub limiter_norm: Option<f64>,
    /// Cosines of the first direction at the last renewals.
    pub cosines: Option<Tensor<1>>,
}

impl ProjectedState {
    pub(crate) fn to_device(&self, device: &Device) -> Self {
        Self {
            subspace: self.subspace.as_ref().map(|subspace| subspace.to_device(device)),
            moment_1: self.moment_1.clone().map(|moment| moment.to_device(device)),
            moment_2: self.moment_2.clone().map(|moment| moment.to_device(device)),
            error: self.error.as_ref().map(|error| error.to_device(device)),
            cosines: self.cosines.clone().map(|cosines| cosines.to_device(device)),
            ..self.clone()
        }
    }
}
