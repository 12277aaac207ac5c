//! Steps that a parameterization takes around those of the optimizer: a function of the step's number alone, so that a resumed run takes the same.

use std::fmt::Debug;

use burn::module::{Module, ParamId};
use burn::optim::{ModuleOptimizer, OptimizerRecord};
use lowrank_optim::registry::{Built, Method, Options};
use lowrank_optim::{MomentResets, OptimError, ParameterRoles, ResetOrder, StateMeter};

use super::layer::NamedLayer;

/// Request for the optimizer of a run.
#[derive(Clone, Copy, Debug)]
pub struct OptimizerRequest<'a> {
    /// The optimizer.
    pub method: &'static Method,
    /// Its options that are given.
    pub options: &'a Options,
    /// The pattern of matrices that it is limited to; empty for all.
    pub include: &'a str,
    /// The pattern of matrices that it leaves out; empty for none.
    pub exclude: &'a str,
    /// The trained parameters.
    pub parameters: &'a ParameterRoles,
    /// The meter of optimizer state.
    pub meter: &'a StateMeter,
}

/// Facts of a run that steps depend on.
#[derive(Clone, Copy, Debug)]
pub struct RunFacts {
    /// Seed of the run.
    pub seed: u64,
    /// Width of the model's residual stream.
    pub width: usize,
}

/// Steps around those of the optimizer.
pub trait LinearSteps: Debug + Send {
    /// Returns the optimizer that these steps require.
    fn optimizer(&self, request: &OptimizerRequest) -> Result<Built, OptimError>;

    /// Reason why these steps need the optimizer's states of all parameters in one process, as
    /// [`Hook::needs_all_states`](lowrank_optim::Hook::needs_all_states).
    fn needs_all_states(&self) -> Option<String> {
        None
    }

    /// Called before the updates of a step, counted from 1.
    fn begin_step(&self, _step: u64) {}

    /// Called after an update of the whole model or of one block, with all layers.
    fn after_update(&self, _layers: Vec<NamedLayer>) -> Result<(), OptimError> {
        Ok(())
    }

    /// Called at the end of a step with all layers; returns the change of the optimizer's state.
    fn end_step(&self, _step: u64, _layers: Vec<NamedLayer>) -> StateChange {
        StateChange::None
    }
}

/// Change of the optimizer's state after a step.
#[derive(Debug)]
pub enum StateChange {
    /// No change.
    None,
    /// All state is reset.
    Clear,
    /// Moments of these parameters are reset.
    Reset {
        /// The handle that the optimizer follows.
        handle: MomentResets,
        /// The reset.
        reset: ResetOrder,
        /// The parameters.
        parameters: Vec<ParamId>,
    },
}

impl StateChange {
    /// Applies the change to the optimizer of a model.
    pub fn apply<M: Module>(self, model: M, optimizer: &mut ModuleOptimizer) -> M {
        match self {
            Self::None => model,
            Self::Clear => {
                *optimizer = optimizer.clone().load_record(OptimizerRecord::default());
                model
            }
            Self::Reset { handle, reset, parameters } => handle.apply(reset, optimizer, model, &parameters),
        }
    }
}
