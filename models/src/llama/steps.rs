//! Steps of a parameterization on the layers of a model, as a hook of a training loop.

use burn::optim::ModuleOptimizer;
use lowrank_optim::{Hook, HookError, StepInfo};

use super::model::Llama;
use crate::linear::LinearSteps;

/// The steps of the parameterization that a model has.
#[derive(Debug)]
pub struct LlamaSteps(pub Box<dyn LinearSteps>);

impl Hook<Llama> for LlamaSteps {
    fn name(&self) -> &'static str {
        "parameterization"
    }

    fn needs_all_states(&self) -> Option<String> {
        self.0.needs_all_states()
    }

    fn begin_step(&mut self, step: &StepInfo, _model: &Llama) -> Result<(), HookError> {
        self.0.begin_step(step.step);
        Ok(())
    }

    fn after_update(&mut self, _step: &StepInfo, model: &mut Llama) -> Result<(), HookError> {
        Ok(self.0.after_update(model.linears_mut())?)
    }

    fn end_step(&mut self, step: &StepInfo, mut model: Llama, optimizer: &mut ModuleOptimizer) -> Llama {
        let change = self.0.end_step(step.step, model.linears_mut());
        change.apply(model, optimizer)
    }
}
