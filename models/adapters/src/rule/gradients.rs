//! Passes over gradients between clipping and the optimizer.

use std::collections::BTreeMap;

use burn::module::{LoraAdapter, Module, Param};
use burn::optim::{GradientsParams, OptimizerRecord};
use burn::tensor::Tensor;
use lowrank_optim::registry::Options;
use lowrank_optim::rules::{LoraFa, LoraPair, LoraPro, LoraProConfig, LoraProMode};
use lowrank_optim::{HiddenMatrices, Hook, HookError, OptimError, Part, StateMeter, StepInfo};

use super::choice::{Rule, refusal, refused};
use crate::ground::error::AdapterError;
use crate::ground::stack::{each_adapter, layer_of};

impl Rule {
    /// The pass over the gradients of this module between clipping and the optimizer; `options` as [`Rule::options`] gave them. Its states
    /// report to the meter.
    pub fn gradient_rule<M: Module>(
        &self,
        module: &M,
        options: &Options,
        meter: &StateMeter,
    ) -> Result<Option<GradientRule>, AdapterError> {
        match *self {
            Self::LoraFa { corrected: true } => Ok(Some(GradientRule::LoraFa(LoraFa::over(self.pairs(module)?)))),
            Self::LoraPro { mode, x_mode, delta } => {
                let mut config = LoraProConfig::new().with_mode(mode).with_x_mode(x_mode).with_delta(delta);
                if mode == LoraProMode::Full {
                    let given = |key: &str| options.get(key).and_then(serde_json::Value::as_f64);
                    config.adam.beta_1 = given("beta_1").unwrap_or(config.adam.beta_1);
                    config.adam.beta_2 = given("beta_2").unwrap_or(config.adam.beta_2);
                    config.adam.epsilon = given("epsilon").unwrap_or(config.adam.epsilon);
                    config.adam.weight_decay = given("weight_decay").unwrap_or(config.adam.weight_decay);
                }
                let rule = config.over(module, self.pairs(module)?, meter).map_err(refusal)?;
                if config.adam.weight_decay > 0.0 {
                    refuse_parts(module, config.adam.weight_decay)?;
                }
                Ok(Some(GradientRule::LoraPro(rule)))
            }
            _ => Ok(None),
        }
    }

    /// The pairs of factors that are trained.
    fn pairs<M: Module>(&self, module: &M) -> Result<Vec<LoraPair>, AdapterError> {
        let mut weights = BTreeMap::new();
        for parameter in HiddenMatrices::of(module).parameters() {
            weights.entry(layer_of(&parameter.path).to_string()).or_insert(parameter.id);
        }
        let mut pairs = Vec::new();
        let mut failed = None;
        each_adapter(module, |path, adapter| {
            for attached in &adapter.stack {
                let trained = |param: &Param<Tensor<2>>| param.is_require_grad();
                match (attached.structure.downcast_ref::<LoraAdapter>(), weights.get(path)) {
                    (Some(lora), Some(weight)) if trained(&lora.b) => {
                        let (a, b, scale) = (lora.a.id, lora.b.id, lora.scale);
                        pairs.push(LoraPair { path: path.to_string(), weight: *weight, a, b, scale });
                        if !trained(&lora.a) && matches!(self, Self::LoraPro { .. }) {
                            failed =
                                Some(format!("A of {path} is frozen, and {} needs the gradients of both", self.name()));
                        }
                    }
                    (Some(lora), _) if !trained(&lora.a) => {}
                    _ => {
                        let name = attached.structure.spec().name;
                        failed = Some(format!("the adapter of {path} is {name}, and {} is for lora", self.name()));
                    }
                }
            }
        });
        match failed {
            Some(reason) => Err(AdapterError::Refused(reason)),
            None => Ok(pairs),
        }
    }
}

/// Decay of the whole weight where more than a base and one product make it.
fn refuse_parts<M: Module>(module: &M, decay: f64) -> Result<(), AdapterError> {
    let mut found = None;
    each_adapter(module, |path, adapter| {
        if adapter.stack.len() > 1 || adapter.stack.iter().any(|attached| attached.origin.is_some()) {
            found = Some(path.to_string());
        }
    });
    match found {
        None => Ok(()),
        Some(path) => refused(
            "optimizer.weight_decay",
            decay,
            format!("lora-pro decays the weight and one product, and {path} has more parts; set it to 0"),
        ),
    }
}

/// A pass over gradients that a [`Rule`] asks for.
#[derive(Clone, Debug)]
pub enum GradientRule {
    /// Corrects B.
    LoraFa(LoraFa),
    /// Adjusts both.
    LoraPro(LoraPro),
}

impl GradientRule {
    /// The gradients as the optimizer is to see them. They may be those of a part of the module.
    pub fn apply(&self, part: &dyn Part, grads: GradientsParams) -> Result<GradientsParams, OptimError> {
        match self {
            Self::LoraFa(rule) => rule.apply(part, grads),
            Self::LoraPro(rule) => rule.apply(part, grads),
        }
    }

    /// Weight decay of the whole weight, base included; call it between [`GradientRule::apply`] and the optimizer. It does nothing where the
    /// optimizer decays.
    pub fn decay<M: Module>(&self, module: M, lr: f64) -> M {
        match self {
            Self::LoraFa(_) => module,
            Self::LoraPro(rule) => rule.decay(module, lr),
        }
    }

    /// State between steps, for a checkpoint; an empty record where there is none.
    pub fn to_record(&self) -> OptimizerRecord {
        match self {
            Self::LoraFa(_) => OptimizerRecord::default(),
            Self::LoraPro(rule) => rule.to_record(),
        }
    }

    /// Goes on from a record.
    pub fn load_record(&self, record: OptimizerRecord) {
        if let Self::LoraPro(rule) = self {
            rule.load_record(record);
        }
    }
}

impl<M: Module> Hook<M> for GradientRule {
    fn name(&self) -> &'static str {
        "rule"
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
        self.decay(model, step.lr)
    }

    fn to_record(&self) -> OptimizerRecord {
        GradientRule::to_record(self)
    }

    fn load_record(&mut self, record: OptimizerRecord) {
        GradientRule::load_record(self, record);
    }
}
