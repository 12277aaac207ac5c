//! Hooks: actions of a method around the steps of a training loop besides the optimizer's update.
//!
//! Hooks are called in this order; a loop that updates blocks one by one calls them for one block at a time:
//!
//! ```text
//! begin_step        before the forward pass
//! search            the model that the step begins with, changed by gradients of further batches
//! loss_term         a term added to the loss
//! before_clipping   the gradients of all micro-batches together, once
//! after_clipping    the gradients as the optimizer is to see them
//! before_update     the model just before the optimizer's step, such as for decay of whole weights
//! after_update      the model just after it
//! end_step          the model and the optimizer once all of the model is updated, or the update was skipped
//! ```
//!
//! [`Hooks`] is a list of them: the trainer holds one, and so can a loop written by hand or an overridden
//! [`TrainStep::optimize`](burn::train::TrainStep::optimize), where [`Hooks::update`] is the one call needed.

use std::fmt;

use burn::module::{Module, ParamId};
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::Tensor;

use crate::part::Part;

/// Error of a hook, of any type.
pub type HookError = Box<dyn std::error::Error + Send + Sync>;

/// Position of a step in its run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepInfo {
    /// Number of the step, from 1.
    pub step: u64,
    /// Steps of the whole run; none when it ends by the clock.
    pub total: Option<u64>,
    /// Learning rate of the step.
    pub lr: f64,
    /// Highest learning rate of the run.
    pub peak_lr: f64,
}

impl StepInfo {
    /// A step of a run with a constant learning rate and no fixed end.
    pub fn constant(step: u64, lr: f64) -> Self {
        Self { step, total: None, lr, peak_lr: lr }
    }
}

/// Gradients that a hook may ask for before a step: of the mean loss over the batches of all processes, without the terms of hooks.
pub trait Losses<M> {
    /// At a model, over the batches that the step learns from.
    fn training(&mut self, model: &M) -> Result<GradientsParams, HookError>;

    /// At a model, over batches that no step learns from.
    fn held_out(&mut self, model: &M) -> Result<GradientsParams, HookError>;
}

/// Actions around the steps of a training loop. Every method does nothing unless it is overridden.
///
/// A hook keeps its own state; state that must survive a restart goes into its record. Methods that take a [`Part`] see the whole model, or
/// one segment of it where segments are updated one by one: a hook must not change parameters outside the part.
#[allow(unused_variables)]
pub trait Hook<M: Module>: Send {
    /// Name, which is that of its file in checkpoints: letters, digits and hyphens.
    fn name(&self) -> &'static str;

    /// Reason why the hook needs all gradients at once; none if it also works on one segment after another.
    fn needs_all_gradients(&self) -> Option<String> {
        None
    }

    /// Reason why the hook needs the optimizer's states of all parameters in one process; none if each parameter's state is
    /// its own.
    fn needs_all_states(&self) -> Option<String> {
        None
    }

    /// Called before the first forward pass of a step.
    fn begin_step(&mut self, step: &StepInfo, model: &M) -> Result<(), HookError> {
        Ok(())
    }

    /// Returns true if [`Hook::search`] is to be called: the loop needs batches that no step learns from.
    fn searches(&self) -> bool {
        false
    }

    /// Returns the model that the step begins with; called after [`Hook::begin_step`].
    fn search(&mut self, step: &StepInfo, model: &M, losses: &mut dyn Losses<M>) -> Result<M, HookError> {
        Ok(model.clone())
    }

    /// Term of shape `[1]` that is added to the mean loss of the step, once a step.
    fn loss_term(&self, step: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        Ok(None)
    }

    /// Changes gradients before they are clipped.
    fn before_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        Ok(grads)
    }

    /// Changes gradients after they are clipped: the optimizer uses the returned gradients.
    fn after_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        Ok(grads)
    }

    /// Changes the model just before the optimizer's step.
    fn before_update(&mut self, step: &StepInfo, model: M) -> M {
        model
    }

    /// Changes the model just after the optimizer's step.
    fn after_update(&mut self, step: &StepInfo, model: &mut M) -> Result<(), HookError> {
        Ok(())
    }

    /// Changes model and optimizer at the end of a step, also of one whose update was skipped.
    fn end_step(&mut self, step: &StepInfo, model: M, optimizer: &mut ModuleOptimizer) -> M {
        model
    }

    /// Trained parameters that are not updated in this step; called after [`Hook::begin_step`].
    fn frozen(&self) -> &[ParamId] {
        &[]
    }

    /// State between steps, for a checkpoint; an empty record if there is none.
    fn to_record(&self) -> OptimizerRecord {
        OptimizerRecord::default()
    }

    /// Restores the state of a record.
    fn load_record(&mut self, record: OptimizerRecord) {}
}

/// The hooks of a training loop, called in order.
pub struct Hooks<M: Module>(Vec<Box<dyn Hook<M>>>);

impl<M: Module> Default for Hooks<M> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<M: Module> From<Vec<Box<dyn Hook<M>>>> for Hooks<M> {
    fn from(hooks: Vec<Box<dyn Hook<M>>>) -> Self {
        Self(hooks)
    }
}

impl<M: Module> fmt::Debug for Hooks<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|hook| hook.name())).finish()
    }
}

impl<M: Module> Hooks<M> {
    /// No hooks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a hook at the end.
    pub fn with(mut self, hook: impl Hook<M> + 'static) -> Self {
        self.0.push(Box::new(hook));
        self
    }

    /// Adds the hooks of another list at the end.
    pub fn append(&mut self, mut more: Self) {
        self.0.append(&mut more.0);
    }

    /// Removes all hooks but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }

    /// The hooks, first to last.
    pub fn iter(&self) -> impl Iterator<Item = &dyn Hook<M>> {
        self.0.iter().map(|hook| &**hook)
    }

    /// Mutable variant of [`Hooks::iter`].
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut (dyn Hook<M> + 'static)> {
        self.0.iter_mut().map(|hook| &mut **hook)
    }

    /// Name and reason of the first hook that needs all gradients at once.
    pub fn needs_all_gradients(&self) -> Option<(&'static str, String)> {
        self.iter().find_map(|hook| Some((hook.name(), hook.needs_all_gradients()?)))
    }

    /// Name and reason of the first hook that needs the states of all parameters.
    pub fn needs_all_states(&self) -> Option<(&'static str, String)> {
        self.iter().find_map(|hook| Some((hook.name(), hook.needs_all_states()?)))
    }

    /// Calls [`Hook::begin_step`] of all.
    pub fn begin_step(&mut self, step: &StepInfo, model: &M) -> Result<(), HookError> {
        self.0.iter_mut().try_for_each(|hook| hook.begin_step(step, model))
    }

    /// Returns true if a hook searches.
    pub fn searches(&self) -> bool {
        self.iter().any(|hook| hook.searches())
    }

    /// Passes the model through [`Hook::search`] of the hooks that search.
    pub fn search(&mut self, step: &StepInfo, model: &M, losses: &mut dyn Losses<M>) -> Result<M, HookError> {
        let mut searching = self.0.iter_mut().filter(|hook| hook.searches());
        searching.try_fold(model.clone(), |model, hook| hook.search(step, &model, losses))
    }

    /// Sum of the terms of all hooks, shape `[1]`; none when no hook has one.
    pub fn loss_term(&self, step: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        let mut sum: Option<Tensor<1>> = None;
        for hook in &self.0 {
            let Some(term) = hook.loss_term(step, part)? else { continue };
            sum = Some(match sum {
                Some(sum) => sum + term,
                None => term,
            });
        }
        Ok(sum)
    }

    /// Passes gradients through [`Hook::before_clipping`] of all.
    pub fn before_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        self.0.iter_mut().try_fold(grads, |grads, hook| hook.before_clipping(step, part, grads))
    }

    /// Passes gradients through [`Hook::after_clipping`] of all.
    pub fn after_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        self.0.iter_mut().try_fold(grads, |grads, hook| hook.after_clipping(step, part, grads))
    }

    /// Passes the model through [`Hook::before_update`] of all.
    pub fn before_update(&mut self, step: &StepInfo, model: M) -> M {
        self.0.iter_mut().fold(model, |model, hook| hook.before_update(step, model))
    }

    /// Calls [`Hook::after_update`] of all.
    pub fn after_update(&mut self, step: &StepInfo, model: &mut M) -> Result<(), HookError> {
        self.0.iter_mut().try_for_each(|hook| hook.after_update(step, model))
    }

    /// Passes the model through [`Hook::end_step`] of all.
    pub fn end_step(&mut self, step: &StepInfo, model: M, optimizer: &mut ModuleOptimizer) -> M {
        self.0.iter_mut().fold(model, |model, hook| hook.end_step(step, model, optimizer))
    }

    /// Parameters that are not updated in this step.
    pub fn frozen(&self) -> Vec<ParamId> {
        self.iter().flat_map(|hook| hook.frozen().iter().copied()).collect()
    }

    /// Runs a whole step of the optimizer with all hook calls that follow the backward pass, without clipping: for loops that have the
    /// gradients of the whole module at once. [`Hooks::begin_step`], [`Hooks::search`] and [`Hooks::loss_term`] belong before the backward
    /// pass. The optimizer steps at the rates `lr`, which may differ between groups of parameters.
    ///
    /// When a hook fails the module is lost with its update: fall back to a checkpoint.
    pub fn update(
        &mut self,
        step: &StepInfo,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        grads: GradientsParams,
        optimizer: &mut ModuleOptimizer,
    ) -> Result<M, HookError> {
        let grads = self.before_clipping(step, &model, grads)?;
        let grads = self.after_clipping(step, &model, grads)?;
        let model = self.before_update(step, model);
        let mut model = optimizer.step(lr, model, grads);
        self.after_update(step, &mut model)?;
        Ok(self.end_step(step, model, optimizer))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::SgdConfig;
    use burn::tensor::Device;

    /// Records its calls.
    struct Log(&'static str, Arc<Mutex<Vec<String>>>);

    impl Log {
        fn note(&self, what: &str) {
            self.1.lock().unwrap().push(format!("{} {what}", self.0));
        }
    }

    impl Hook<Linear> for Log {
        fn name(&self) -> &'static str {
            self.0
        }

        fn needs_all_gradients(&self) -> Option<String> {
            (self.0 == "second").then(|| "it compares layers".into())
        }

        fn loss_term(&self, _: &StepInfo, _: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
            Ok(Some(Tensor::ones([1], &Device::default())))
        }

        fn before_clipping(
            &mut self,
            _: &StepInfo,
            _: &dyn Part,
            grads: GradientsParams,
        ) -> Result<GradientsParams, HookError> {
            self.note("before clipping");
            Ok(grads)
        }

        fn after_clipping(
            &mut self,
            step: &StepInfo,
            _: &dyn Part,
            grads: GradientsParams,
        ) -> Result<GradientsParams, HookError> {
            self.note("after clipping");
            if step.step == 9 { Err("not in step 9".into()) } else { Ok(grads) }
        }

        fn before_update(&mut self, _: &StepInfo, model: Linear) -> Linear {
            self.note("before update");
            Linear { bias: None, ..model }
        }

        fn end_step(&mut self, _: &StepInfo, model: Linear, _: &mut ModuleOptimizer) -> Linear {
            self.note("end");
            model
        }
    }

    #[test]
    fn hooks_are_asked_one_after_the_other_at_each_point_and_may_change_the_model() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut hooks = Hooks::new().with(Log("first", log.clone())).with(Log("second", log.clone()));
        let model = LinearConfig::new(3, 2).init(&Device::default().autodiff());
        let step = StepInfo::constant(1, 0.1);
        let term = hooks.loss_term(&step, &model).unwrap().unwrap();
        assert_eq!(term.into_scalar::<f32>(), 2.0);
        assert_eq!(hooks.needs_all_gradients().unwrap().0, "second");
        let mut optimizer = SgdConfig::new().init();
        let model = hooks.update(&step, step.lr, model, GradientsParams::new(), &mut optimizer).unwrap();
        assert!(model.bias.is_none());
        let asked = ["before clipping", "after clipping", "before update", "end"];
        let expected: Vec<String> =
            asked.iter().flat_map(|what| [format!("first {what}"), format!("second {what}")]).collect();
        assert_eq!(*log.lock().unwrap(), expected);
        let step = StepInfo::constant(9, 0.1);
        let error = hooks.update(&step, step.lr, model, GradientsParams::new(), &mut optimizer).unwrap_err();
        assert_eq!(error.to_string(), "not in step 9");
    }
}
