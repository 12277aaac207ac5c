//! A penalty on matrices of a module, chosen by name or by their role in an adapter.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use lowrank_optim::{Hook, HookError, ModulePath, ParameterVisitor, Part, StepInfo, visit_parameters};

use super::definition::MatrixPenalty;
use crate::ground::error::AdapterError;
use crate::ground::spec::TensorRole;
use crate::ground::stack::each_adapter;
use crate::ground::targets::NamePattern;

/// Roles of an adapter's tensors, as a configuration names them.
const ROLES: [(&str, TensorRole); 2] = [("adapter-a", TensorRole::A), ("adapter-b", TensorRole::B)];

/// Adds a penalty on trained matrices to the loss of every step.
#[derive(Debug)]
pub struct PenaltyHook {
    penalty: Box<dyn MatrixPenalty>,
    /// Paths of the matrices by id.
    matrices: BTreeMap<ParamId, String>,
}

impl PenaltyHook {
    /// Selects the trained matrices of a module: `adapter-a` and `adapter-b` are the factors of adapters, anything else a regular expression for the
    /// end of a parameter's path, after a dot. Rejects a word that selects none.
    pub fn new<M: Module>(
        penalty: Box<dyn MatrixPenalty>,
        matrices: &[String],
        module: &M,
    ) -> Result<Self, AdapterError> {
        let known = trained_matrices(module);
        let mut selected = BTreeMap::new();
        for word in matrices {
            let role = ROLES.iter().find(|(name, _)| name == word).map(|(_, role)| *role);
            let pattern = if role.is_none() { Some(NamePattern::new(word, "penalty.matrices")?) } else { None };
            let mut found = Vec::new();
            for (id, (path, of)) in &known {
                let fits = match &pattern {
                    Some(pattern) => pattern.matches(path)?,
                    None => *of == role,
                };
                if fits {
                    found.push((*id, path.clone()));
                }
            }
            if found.is_empty() {
                let some: Vec<&str> = known.values().map(|(path, _)| path.as_str()).take(3).collect();
                return Err(AdapterError::Setting {
                    key: "penalty.matrices".into(),
                    value: word.clone(),
                    reason: match some.is_empty() {
                        true => "no matrix is trained".into(),
                        false => format!(
                            "no trained matrix has such a name; use adapter-a, adapter-b, or the end of a name such as {}",
                            some.join(", ")
                        ),
                    },
                });
            }
            selected.extend(found);
        }
        Ok(Self { penalty, matrices: selected })
    }

    /// Paths of the selected matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &str> {
        self.matrices.values().map(String::as_str)
    }
}

/// Paths and roles of a module's trained matrices.
fn trained_matrices<M: Module>(module: &M) -> BTreeMap<ParamId, (String, Option<TensorRole>)> {
    struct Find(BTreeMap<ParamId, (String, Option<TensorRole>)>);
    impl ParameterVisitor for Find {
        fn float<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<D>>) {
            if D == 2 && param.is_require_grad() {
                self.0.insert(param.id, (path.joined(), None));
            }
        }
    }
    let mut found = Find(BTreeMap::new());
    visit_parameters(module, &mut found);
    each_adapter(module, |layer, stack| {
        for tensor in stack.stack.iter().filter(|adapter| adapter.is_trained()).flat_map(|adapter| adapter.shapes()) {
            if tensor.shape.len() == 2 && tensor.role != TensorRole::Frozen {
                found.0.insert(tensor.id, (format!("{layer}.{}", tensor.field), Some(tensor.role)));
            }
        }
    });
    found.0
}

impl<M: Module> Hook<M> for PenaltyHook {
    fn name(&self) -> &'static str {
        "penalty"
    }

    fn loss_term(&self, _: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        struct Sum<'a> {
            hook: &'a PenaltyHook,
            sum: Option<Tensor<1>>,
        }
        impl ModuleVisitor for Sum<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if !self.hook.matrices.contains_key(&param.id) || !param.is_require_grad() {
                    return;
                }
                let [rows, columns] = [0, 1].map(|axis| param.lazy_shape()[axis]);
                let Some(term) = self.hook.penalty.of(param.val().reshape([rows, columns])) else { return };
                self.sum = Some(match self.sum.take() {
                    Some(sum) => sum + term,
                    None => term,
                });
            }
        }
        let mut visitor = Sum { hook: self, sum: None };
        part.walk(&mut visitor);
        Ok(visitor.sum)
    }
}
