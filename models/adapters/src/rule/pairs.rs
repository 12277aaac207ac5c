//! The factors of plain LoRA adapters, for rules that need both.

use std::collections::BTreeMap;

use burn::module::{LoraAdapter, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use lowrank_optim::rules::LoraPair;
use lowrank_optim::{ModulePath, Part};

use super::definition::Rule;
use crate::ground::error::AdapterError;
use crate::ground::stack::{each_adapter, layer_of};

/// Pairs of factors whose B is trained. With `both`, a frozen A is rejected.
pub(super) fn trained_pairs(rule: &dyn Rule, part: &dyn Part, both: bool) -> Result<Vec<LoraPair>, AdapterError> {
    let mut weights = Weights::default();
    part.walk(&mut weights);
    let mut pairs = Vec::new();
    let mut failed = None;
    each_adapter(part, |path, adapter| {
        for attached in &adapter.stack {
            let trained = |param: &Param<Tensor<2>>| param.is_require_grad();
            match (attached.structure.downcast_ref::<LoraAdapter>(), weights.found.get(path)) {
                (Some(lora), Some(weight)) if trained(&lora.b) => {
                    let (a, b, scale) = (lora.a.id, lora.b.id, lora.scale);
                    pairs.push(LoraPair { path: path.to_string(), weight: *weight, a, b, scale });
                    if both && !trained(&lora.a) {
                        failed =
                            Some(format!("A of {path} is frozen, and {} needs the gradients of both", rule.name()));
                    }
                }
                (Some(lora), _) if !trained(&lora.a) => {}
                _ => {
                    let name = attached.structure.spec().name;
                    failed = Some(format!("the adapter of {path} is {name}, and {} is for lora", rule.name()));
                }
            }
        }
    });
    match failed {
        Some(reason) => Err(AdapterError::Refused(reason)),
        None => Ok(pairs),
    }
}

/// Id of each layer's first parameter, its weight, by layer path.
#[derive(Default)]
struct Weights {
    path: ModulePath,
    found: BTreeMap<String, ParamId>,
}

impl ModuleVisitor for Weights {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.joined();
        self.found.entry(layer_of(&path).to_string()).or_insert(param.id);
    }
}
