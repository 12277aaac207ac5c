//! Gradient rules behind one trait, as hooks of a training loop.

use std::fmt::Debug;

use burn::module::{Module, ParamId};
use burn::optim::{GradientsParams, OptimizerRecord};

use super::allora::AlloraRowsOnly;
use super::lora_fa::LoraFa;
use super::lora_pro::LoraPro;
use super::multiply::multiplied;
use crate::{Hook, HookError, OptimError, Part, StepInfo};

/// A pass over gradients after clipping and before the optimizer, for any module.
pub trait GradientRule: Debug + Send {
    /// Name, which is that of its file in checkpoints.
    fn name(&self) -> &'static str;

    /// The gradients for the optimizer; a part of the module is supported too.
    fn apply(&self, part: &dyn Part, grads: GradientsParams) -> Result<GradientsParams, OptimError>;

    /// Factors that parameters are multiplied by just before the optimizer's step: decay that acts on more than one of them together.
    fn decay_factors(&self, _lr: f64) -> Vec<(ParamId, f64)> {
        Vec::new()
    }

    /// Reason why the rule needs the states of all parameters in one process, as [`Hook::needs_all_states`].
    fn needs_all_states(&self) -> Option<String> {
        None
    }

    /// State between steps, for a checkpoint; an empty record if there is none.
    fn to_record(&self) -> OptimizerRecord {
        OptimizerRecord::default()
    }

    /// Restores the state of a record.
    fn load_record(&self, _record: OptimizerRecord) {}
}

impl dyn GradientRule + '_ {
    /// The module with its decay; call it between [`GradientRule::apply`] and the optimizer.
    pub fn decay<M: Module>(&self, module: M, lr: f64) -> M {
        multiplied(module, &self.decay_factors(lr))
    }
}

impl GradientRule for Box<dyn GradientRule> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn apply(&self, part: &dyn Part, grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        (**self).apply(part, grads)
    }

    fn decay_factors(&self, lr: f64) -> Vec<(ParamId, f64)> {
        (**self).decay_factors(lr)
    }

    fn needs_all_states(&self) -> Option<String> {
        (**self).needs_all_states()
    }

    fn to_record(&self) -> OptimizerRecord {
        (**self).to_record()
    }

    fn load_record(&self, record: OptimizerRecord) {
        (**self).load_record(record);
    }
}

impl<M: Module, G: GradientRule> Hook<M> for G {
    fn name(&self) -> &'static str {
        GradientRule::name(self)
    }

    fn needs_all_states(&self) -> Option<String> {
        GradientRule::needs_all_states(self)
    }

    fn after_clipping(
        &mut self,
        _: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        Ok(self.apply(part, grads)?)
    }

    fn before_update(&mut self, step: &StepInfo, model: M) -> M {
        multiplied(model, &self.decay_factors(step.lr))
    }

    fn to_record(&self) -> OptimizerRecord {
        GradientRule::to_record(self)
    }

    fn load_record(&mut self, record: OptimizerRecord) {
        GradientRule::load_record(self, record);
    }
}

impl GradientRule for LoraPro {
    fn name(&self) -> &'static str {
        "lora-pro"
    }

    fn apply(&self, part: &dyn Part, grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        LoraPro::apply(self, part, grads)
    }

    fn decay_factors(&self, lr: f64) -> Vec<(ParamId, f64)> {
        LoraPro::decay_factors(self, lr)
    }

    fn needs_all_states(&self) -> Option<String> {
        Some("the moments of the factors are its own, which changes the gradients of a pair together".into())
    }

    fn to_record(&self) -> OptimizerRecord {
        LoraPro::to_record(self)
    }

    fn load_record(&self, record: OptimizerRecord) {
        LoraPro::load_record(self, record);
    }
}

impl GradientRule for LoraFa {
    fn name(&self) -> &'static str {
        "lora-fa"
    }

    fn apply(&self, part: &dyn Part, grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        LoraFa::apply(self, part, grads)
    }
}

/// Clipping sees the scaled gradients.
impl<M: Module> Hook<M> for AlloraRowsOnly {
    fn name(&self) -> &'static str {
        "allora"
    }

    fn before_clipping(
        &mut self,
        _: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        Ok(self.apply(part, grads)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::LoraProConfig;
    use super::*;
    use crate::Hooks;
    use burn::module::Lora;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::SgdConfig;
    use burn::tensor::{Device, Tensor};

    #[test]
    fn a_list_of_hooks_does_what_rule_decay_and_optimizer_do_one_after_the_other() {
        let device = Device::default().autodiff();
        let start = LinearConfig::new(6, 5).with_bias(false).init(&device).apply_lora(Lora::new(2, 4.0));
        let rule = || LoraProConfig::new().with_weight_decay(0.3).init(&start).unwrap();
        let grads = |layer: &Linear, step: u64| {
            let x = Tensor::<2>::full([3, 6], 0.1 * (step + 1) as f32, &device);
            GradientsParams::from_grads((layer.forward(x) - 1.0).square().sum().backward(), layer)
        };
        let (by_hand, mut hooks) = (rule(), Hooks::<Linear>::new().with(rule()));
        let (mut ours, mut theirs) = (start.clone(), start.clone());
        let mut optimizers = [SgdConfig::new().init(), SgdConfig::new().init()];
        for step in 0..3 {
            let found = by_hand.apply(&ours, grads(&ours, step)).unwrap();
            ours = optimizers[0].step(0.05, by_hand.decay(ours, 0.05), found);
            let info = StepInfo::constant(step + 1, 0.05);
            let found = grads(&theirs, step);
            theirs = hooks.update(&info, 0.05, theirs, found, &mut optimizers[1]).unwrap();
        }
        assert_eq!(ours.weight.val().into_data(), theirs.weight.val().into_data());
        assert!(ours.weight.val().into_data() != start.weight.val().into_data());
        let hook = hooks.iter().next().unwrap();
        assert_eq!(hook.name(), "lora-pro");
        assert_eq!(hook.to_record().len(), by_hand.to_record().len());
    }
}
