//! Interface of a training rule.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Deref;

use burn::module::{Module, ParamGroup, ParamId};
use lowrank_optim::registry::{Entry, OptionError, Options, Registered};
use lowrank_optim::rules::GradientRule;
use lowrank_optim::{Parameter, ParameterRoles, Part, Role, StateMeter};
use serde::de::DeserializeOwned;

use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::spec::TensorRole;
use crate::ground::stack::each_adapter;

/// A training rule with its options. Every method has a default that changes nothing.
pub trait Rule: Debug + Send + Sync {
    /// Returns its entry in the list of rules.
    fn entry(&self) -> &'static RuleEntry;

    /// Adjusts the adapter's configuration to the rule; rejects options outside their range and unsupported adapters.
    fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        Ok(config)
    }

    /// Returns true if the rule is supported without an adapter.
    fn trains_weights(&self) -> bool {
        false
    }

    /// Warnings about settings that are allowed but rarely intended.
    fn warnings(&self, _config: &AdapterConfig) -> Vec<String> {
        Vec::new()
    }

    /// Returns true if tensors of this role are frozen.
    fn freezes(&self, _role: TensorRole) -> bool {
        false
    }

    /// Adjusts the options of an optimizer to the rule, on top of those given; rejects optimizers that the rule does
    /// not support.
    fn options(&self, _method: &str, options: Options) -> Result<Options, AdapterError> {
        Ok(options)
    }

    /// Rejects optimizer options under which the adapter alone does not contain everything that was trained.
    fn check_adapter_alone(&self, _options: &Options) -> Result<(), AdapterError> {
        Ok(())
    }

    /// Changes how a trained parameter is updated; the role is that of an adapter's tensor.
    fn tune(&self, _parameter: &mut Parameter, _role: Option<TensorRole>) {}

    /// Pass over the gradients of these parameters between clipping and the optimizer, if the rule has one; `options`
    /// are those returned by [`Rule::options`]. Its states report to the meter.
    fn gradients(
        &self,
        _part: &dyn Part,
        _options: &Options,
        _meter: &StateMeter,
    ) -> Result<Option<Box<dyn GradientRule>>, AdapterError> {
        Ok(None)
    }

    /// Bytes of state that the rule itself keeps for an adapted weight `[d_in, d_out]`.
    fn state_bytes(&self, _shape: [usize; 2]) -> usize {
        0
    }
}

impl dyn Rule + '_ {
    /// Name in configurations.
    pub fn name(&self) -> &'static str {
        self.entry().entry.name
    }

    /// Same as [`Rule::prepare`], for a configuration that is validated first.
    pub fn prepared(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        config.validate()?;
        self.prepare(config)
    }

    /// Freezes the tensors that the rule does not train.
    pub fn freeze<M: Module>(&self, module: M) -> M {
        let mut ids = Vec::new();
        each_adapter(&module, |_, adapter| {
            let tensors = adapter.stack.iter().flat_map(|attached| attached.shapes());
            ids.extend(tensors.filter(|tensor| self.freezes(tensor.role)).map(|tensor| tensor.id));
        });
        if ids.is_empty() { module } else { module.freeze_group(ParamGroup::from_ids(ids)) }
    }

    /// Trained parameters, each with the update settings of rule and structure.
    pub fn parameters<M: Module>(&self, module: &M) -> ParameterRoles {
        let mut adapters: BTreeMap<ParamId, (TensorRole, f64)> = BTreeMap::new();
        each_adapter(module, |_, adapter| {
            for attached in &adapter.stack {
                for tensor in attached.shapes() {
                    adapters.insert(tensor.id, (tensor.role, attached.structure().lr_scale(&tensor.field)));
                }
            }
        });
        ParameterRoles::of(module).trained(|parameter| {
            let found = adapters.get(&parameter.id).copied();
            let matrix = parameter.shape.len() == 2;
            if let Some((role, lr_scale)) = found {
                parameter.lr_scale = lr_scale;
                parameter.decays = role.decays();
                parameter.role = match (matrix, role.decays()) {
                    (true, true) => Role::Hidden,
                    (true, false) => Role::Excluded,
                    (false, _) => Role::Other,
                };
            }
            self.tune(parameter, found.map(|(role, _)| role));
        })
    }
}

/// Entry of the list of rules.
#[derive(Clone, Copy, Debug)]
pub struct RuleEntry {
    /// Description of the rule.
    pub entry: Entry,
    /// Reads the rule with the given options on top of its defaults.
    pub read: fn(&Options) -> Result<Box<dyn Rule>, AdapterError>,
}

impl Deref for RuleEntry {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Registered for RuleEntry {
    fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// Reads a rule whose fields are its options.
pub(super) fn read<R: Rule + DeserializeOwned + 'static>(
    entry: &RuleEntry,
    options: &Options,
) -> Result<Box<dyn Rule>, AdapterError> {
    let rule = entry.entry.configure::<R>(options).map_err(|error| error.under("rule.options"))?;
    Ok(Box::new(rule))
}

pub(super) fn refused<T>(key: &str, value: impl ToString, reason: impl Into<String>) -> Result<T, AdapterError> {
    Err(OptionError::value(key, value.to_string(), reason).into())
}

pub(super) fn refusal(error: impl ToString) -> AdapterError {
    AdapterError::Refused(error.to_string())
}

/// Rejects structures other than plain LoRA.
pub(super) fn of_lora(rule: &dyn Rule, config: &AdapterConfig, reason: &str) -> Result<(), AdapterError> {
    match config.structure.as_str() {
        "lora" => Ok(()),
        other => refused("rule.name", rule.name(), format!("{reason}; {other} is another structure, use lora")),
    }
}

/// Rejects optimizers other than AdamW.
pub(super) fn with_adamw(rule: &dyn Rule, method: &str, why: &str) -> Result<(), AdapterError> {
    match method {
        "adamw" => Ok(()),
        other => Err(AdapterError::Refused(format!(
            "optimizer.name = {other}: not supported with rule {}, {why}; set it to adamw",
            rule.name()
        ))),
    }
}
