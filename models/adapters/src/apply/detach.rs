//! Taking adapters off a module, and putting them back.

use std::collections::BTreeMap;

use burn::module::{Module, Param, ParamId, Reparameterizer};
use burn::tensor::Tensor;

use crate::ground::control::Control;
use crate::ground::error::AdapterError;
use crate::ground::layers::adaptable_weights;
use crate::ground::stack::{Adapter, AdapterStack, each_adapter};

/// Removes an adapter and restores the base weights bit for bit.
pub fn detach<M: Module>(module: M, name: &str) -> Result<M, AdapterError> {
    let mut stacks = stacks(&module);
    let all = controls(&stacks);
    if !all.iter().any(|(control, _)| control.name() == name) {
        let known: Vec<&str> = all.iter().map(|(control, _)| control.name()).collect();
        return Err(AdapterError::Refused(format!("the model has no adapter \"{name}\"; it has {known:?}")));
    }
    for stack in stacks.values_mut() {
        stack.retain(|attached| attached.control().name() != name);
    }
    put_back(module, stacks)
}

/// Replaces the adapters of a module by these.
pub(super) fn put_back<M: Module>(module: M, mut stacks: BTreeMap<String, Vec<Adapter>>) -> Result<M, AdapterError> {
    let all = controls(&self::stacks(&module));
    // Disabled adapters fold into nothing.
    all.iter().for_each(|(control, _)| control.switch(false));
    let found = adaptable_weights(&module);
    let module = module.materialize();
    all.iter().for_each(|(control, on)| control.switch(*on));
    stacks.retain(|_, stack| !stack.is_empty());
    let ids = found?.into_iter().map(|(id, layer)| (id, layer.path)).collect();
    Ok(module.apply_reparameterization(PutBack { ids, stacks }))
}

/// Names and handles of a module's adapters, in the order they were attached.
pub fn adapters_of<M: Module>(module: &M) -> Vec<Control> {
    controls(&stacks(module)).into_iter().map(|(control, _)| control).collect()
}

/// Adapters of every layer that has any.
pub(super) fn stacks<M: Module>(module: &M) -> BTreeMap<String, Vec<Adapter>> {
    let mut stacks = BTreeMap::new();
    each_adapter(module, |layer, adapter| {
        stacks.insert(layer.to_string(), adapter.stack.clone());
    });
    stacks
}

/// Handles of the adapters and their switches, each once.
pub(super) fn controls(stacks: &BTreeMap<String, Vec<Adapter>>) -> Vec<(Control, bool)> {
    let mut found: Vec<(Control, bool)> = Vec::new();
    for attached in stacks.values().flatten() {
        if found.iter().all(|(control, _)| control.name() != attached.control().name()) {
            found.push((attached.control().clone(), attached.control().is_on()));
        }
    }
    found
}

struct PutBack {
    ids: BTreeMap<ParamId, String>,
    stacks: BTreeMap<String, Vec<Adapter>>,
}

impl Reparameterizer for PutBack {
    type Reparam = AdapterStack;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<AdapterStack>) {
        let stack = self.ids.get(&param.id).filter(|_| D == 2).and_then(|path| self.stacks.remove(path));
        (param, stack.map(|stack| AdapterStack { stack }))
    }
}
