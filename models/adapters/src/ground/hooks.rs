//! Adapter hooks of each step: penalties, and temporarily frozen tensors.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_optim::{Hook, HookError, Part, StepInfo};

use super::base::Base;
use super::error::AdapterError;
use super::spec::TensorRole;
use super::stack::{Adapter, each_adapted, each_adapter};
use super::structure::{PenaltyAt, StepOf};

/// Sum of the trained adapters' penalties that are applied at this point, shape `[1]`; none if there are none.
pub fn penalty(part: &dyn Part, at: PenaltyAt) -> Option<Tensor<1>> {
    let mut sum: Option<Tensor<1>> = None;
    each_adapted(part, |_, weight, adapter| {
        let on = adapter.stack.iter().enumerate();
        let on = on.filter(|(_, attached)| attached.control().is_on() && attached.is_trained());
        let of = |(below, attached): (usize, &Adapter)| {
            let base = Base::new(weight, None).under(&adapter.stack, below).less(attached.origin.as_ref());
            attached.structure().penalty(&base, &attached.control().totals())
        };
        for penalty in on.filter_map(of).filter(|penalty| penalty.at == at) {
            sum = Some(match sum.take() {
                Some(sum) => sum + penalty.value,
                None => penalty.value,
            });
        }
    });
    sum
}

/// Adds the gradients of penalties applied after clipping, divided by the peak learning rate.
pub fn add_after_clipping(
    part: &dyn Part,
    mut grads: GradientsParams,
    peak_lr: f64,
) -> Result<GradientsParams, AdapterError> {
    struct Add<'a> {
        grads: &'a mut GradientsParams,
        more: GradientsParams,
    }
    impl ModuleVisitor for Add<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(more) = self.more.remove::<D>(param.id) else { return };
            let sum = match self.grads.remove::<D>(param.id) {
                Some(grad) => grad + more,
                None => more,
            };
            self.grads.register(param.id, sum);
        }
    }
    if let Some(penalty) = penalty(part, PenaltyAt::AfterClipping) {
        if !(peak_lr > 0.0 && peak_lr.is_finite()) {
            return Err(AdapterError::Refused(format!(
                "the adapter's penalty is divided by the peak learning rate, which is {peak_lr}: give one above 0, or take the penalty away"
            )));
        }
        let more = part.gradients(penalty.div_scalar(peak_lr).backward());
        part.walk(&mut Add { grads: &mut grads, more });
    }
    Ok(grads)
}

/// Trained tensors that are frozen in this step.
pub fn frozen_this_step(part: &dyn Part, step: StepOf) -> Vec<ParamId> {
    let mut frozen = Vec::new();
    each_adapter(part, |_, adapter| {
        for attached in &adapter.stack {
            let tensors = attached.shapes().into_iter().filter(|tensor| tensor.role != TensorRole::Frozen);
            let now = tensors.filter(|tensor| attached.structure().frozen_at(&tensor.field, step));
            frozen.extend(now.map(|tensor| tensor.id));
        }
    });
    frozen
}

/// Drops the gradients of the tensors listed by [`frozen_this_step`].
pub fn drop_frozen(part: &dyn Part, mut grads: GradientsParams, frozen: &[ParamId]) -> GradientsParams {
    struct Drop<'a> {
        grads: &'a mut GradientsParams,
        frozen: &'a [ParamId],
    }
    impl ModuleVisitor for Drop<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.frozen.contains(&param.id) {
                self.grads.remove::<D>(param.id);
            }
        }
    }
    if !frozen.is_empty() {
        part.walk(&mut Drop { grads: &mut grads, frozen });
    }
    grads
}

/// Applies the penalties of a module's adapters and freezes their tensors temporarily, as a hook of any training loop.
#[derive(Clone, Debug, Default)]
pub struct AdapterSteps {
    frozen: Vec<ParamId>,
}

impl<M: Module> Hook<M> for AdapterSteps {
    fn name(&self) -> &'static str {
        "adapters"
    }

    fn begin_step(&mut self, step: &StepInfo, model: &M) -> Result<(), HookError> {
        self.frozen = frozen_this_step(model, StepOf { step: step.step - 1, total: step.total });
        Ok(())
    }

    fn loss_term(&self, _: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        Ok(penalty(part, PenaltyAt::Loss))
    }

    fn before_clipping(
        &mut self,
        _: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        Ok(drop_frozen(part, grads, &self.frozen))
    }

    fn after_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        Ok(drop_frozen(part, add_after_clipping(part, grads, step.peak_lr)?, &self.frozen))
    }

    fn frozen(&self) -> &[ParamId] {
        &self.frozen
    }
}
