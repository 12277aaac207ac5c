//! What a parameterization does around the updates of a run: a function of the step alone, so that a resumed run does the same.

use burn::optim::{ModuleOptimizer, OptimizerRecord};
use lowrank_models::Llama;
use lowrank_optim::loro::LoroSteps;
use lowrank_optim::{Hook, HookError, Keep, MomentReset, MomentResets, StepInfo};

/// What happens around updates beside the optimizer's steps.
#[derive(Clone, Debug, Default)]
pub enum Cycle {
    /// Nothing.
    #[default]
    None,
    /// Restarts of ReLoRA.
    ReLora {
        /// Updates from one restart to the next.
        every: u64,
        /// What a restart leaves of the factors' moments.
        keep: Keep,
        /// Seed of new factors, and of what is left by lot.
        seed: u64,
        /// Handle of the optimizers.
        resets: MomentResets,
    },
    /// Exact steps of LORO, after which all optimizer state begins anew.
    Loro {
        /// Updates from one exact step to the next.
        every: u64,
        /// Handle of the optimizers.
        steps: LoroSteps,
    },
}

impl Cycle {
    /// The number of the restart that follows this update, counted from 1; restarts follow updates `every + 1`, `2 every + 1` and so on.
    pub fn restart_after(&self, step: u64) -> Option<u64> {
        match self {
            Self::ReLora { every, .. } if step > *every && (step - 1).is_multiple_of(*every) => {
                Some((step - 1) / every)
            }
            _ => None,
        }
    }
}

impl Hook<Llama> for Cycle {
    fn name(&self) -> &'static str {
        "cycle"
    }

    fn begin_step(&mut self, step: &StepInfo, _: &Llama) -> Result<(), HookError> {
        if let Self::Loro { every, steps } = self {
            steps.expect(step.step.is_multiple_of(*every));
        }
        Ok(())
    }

    fn after_update(&mut self, _: &StepInfo, model: &mut Llama) -> Result<(), HookError> {
        match self {
            Self::Loro { steps, .. } => Ok(model.exact_steps(steps)?),
            _ => Ok(()),
        }
    }

    fn end_step(&mut self, step: &StepInfo, mut model: Llama, optimizer: &mut ModuleOptimizer) -> Llama {
        match self {
            Self::ReLora { keep, seed, resets, .. } => {
                let (keep, seed, resets) = (*keep, *seed, resets.clone());
                let Some(number) = self.restart_after(step.step) else { return model };
                let factors = model.restart(seed, number);
                resets.apply(MomentReset { keep, seed, number }, optimizer, model, &factors)
            }
            Self::Loro { every, .. } if step.step.is_multiple_of(*every) => {
                *optimizer = optimizer.clone().load_record(OptimizerRecord::default());
                model
            }
            _ => model,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_follow_the_updates_after_each_period() {
        let cycle = Cycle::ReLora { every: 5, keep: Keep::Nothing, seed: 0, resets: MomentResets::default() };
        let found: Vec<_> = (0..=21).filter_map(|step| Some((step, cycle.restart_after(step)?))).collect();
        assert_eq!(found, [(6, 1), (11, 2), (16, 3), (21, 4)]);
        let every = Cycle::ReLora { every: 1, keep: Keep::Nothing, seed: 0, resets: MomentResets::default() };
        assert_eq!((1..4).map(|step| every.restart_after(step)).collect::<Vec<_>>(), [None, Some(1), Some(2)]);
        assert_eq!(Cycle::None.restart_after(6), None);
    }
}
