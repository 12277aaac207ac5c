//! Parameterizations of linear layers: options, the layer that they make, and their consequences for a run.

use std::fmt::Debug;
use std::ops::Deref;

use lowrank_optim::registry::{Entry, OptionError, Registered};

use super::layer::LinearLayer;
use super::steps::{LinearSteps, RunFacts};
use crate::error::ModelError;
use crate::weights::Builder;

/// Description of a parameterization: its registry entry, and its properties in a run.
#[derive(Clone, Copy, Debug)]
pub struct ParameterizationSpec {
    /// Registry entry; its memory formula states the elements that a `d_in x d_out` weight becomes.
    pub entry: Entry,
    /// The option that counts the updates from one restart to the next; none for a parameterization without restarts.
    pub period: Option<&'static str>,
    /// Its layers can start from the dense weights of a trained model.
    pub starts_from_dense: bool,
    /// Dense weights give the same outputs, or the reason why they do not.
    pub exports: Result<(), &'static str>,
    /// The rank, as a divisor of the model's width, at which the planner offers it where dense layers do not fit; none where it is not offered.
    pub saves_memory: Option<usize>,
}

impl ParameterizationSpec {
    /// A parameterization that only replaces the weights, to be completed with `..`.
    pub(super) const fn plain(entry: Entry) -> Self {
        Self { entry, period: None, starts_from_dense: false, exports: Ok(()), saves_memory: None }
    }
}

impl Deref for ParameterizationSpec {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Registered for ParameterizationSpec {
    fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// Restarts of a parameterization, for the learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPlan {
    /// Updates from one restart to the next.
    pub every: u64,
    /// Steps of linear warm-up after each restart.
    pub warmup_steps: u64,
    /// Restarts come inside the first warm-up too.
    pub in_warmup: bool,
    /// The learning rate has to be 0 at a restart.
    pub needs_zero_rate: bool,
}

/// The options of a parameterization.
pub trait LinearMethod: Debug {
    /// The layer.
    type Layer: LinearLayer
    where
        Self: Sized;

    /// Description.
    fn spec() -> &'static ParameterizationSpec
    where
        Self: Sized;

    /// Rejects incompatible values; the allowed values of each single option are stated at its field.
    fn check(&self) -> Result<(), OptionError> {
        Ok(())
    }

    /// Rejects a weight `[d_in, d_out]` that cannot be replaced, with the reason.
    fn check_shape(&self, _shape: [usize; 2]) -> Result<(), String> {
        Ok(())
    }

    /// Trained elements in place of a weight `[d_in, d_out]`.
    fn values(&self, shape: [usize; 2]) -> usize;

    /// Positions of 4 bytes that are stored and not trained, in place of a weight `[d_in, d_out]`.
    fn positions(&self, _shape: [usize; 2]) -> usize {
        0
    }

    /// Elements that the forward pass of a layer keeps for the backward pass in addition to its input, for each row of it, on the CPU backend.
    fn kept(&self, d_in: usize) -> usize;

    /// Floating-point operations of the products of a forward pass over `rows` rows in place of a weight `[d_in, d_out]`, and of its backward
    /// pass.
    fn operations(&self, shape: [usize; 2], rows: usize) -> [u64; 2] {
        let forward = 2 * (rows * self.values(shape)) as u64;
        [forward, 2 * forward]
    }

    /// Returns true if the SwiGLU part keeps the non-linearity of its gate.
    fn keeps_gate(&self) -> bool {
        true
    }

    /// Its restarts; none for a parameterization without them.
    fn restarts(&self) -> Option<RestartPlan> {
        None
    }

    /// Its steps around those of the optimizer; none for a parameterization that the optimizer alone trains.
    fn steps(&self, _run: RunFacts) -> Option<Box<dyn LinearSteps>> {
        None
    }

    /// The layer in place of the weight `[d_in, d_out]` at a path.
    fn build(&self, builder: &mut Builder, path: &str, shape: [usize; 2]) -> Result<Self::Layer, ModelError>
    where
        Self: Sized;
}

/// Rejects a warm-up that does not end before the next restart.
pub(super) fn ends_before_restart(warmup_steps: u64, every: u64) -> Result<(), OptionError> {
    if warmup_steps < every {
        return Ok(());
    }
    let reason = format!("must be smaller than the {every} updates from one restart to the next");
    Err(OptionError::value("restart_warmup", warmup_steps, reason))
}

/// Rejects a rank above the smaller side.
pub(super) fn rank_fits(rank: usize, [d_in, d_out]: [usize; 2]) -> Result<(), String> {
    match d_in.min(d_out) {
        smaller if rank > smaller => Err(format!("rank {rank} is larger than its smaller side, {smaller}")),
        _ => Ok(()),
    }
}
