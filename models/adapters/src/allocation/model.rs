//! The model that an allocation changes, of any type.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::Tensor;
use lowrank_optim::Part;

use crate::apply::{MakeStructure, rebuild};
use crate::ground::error::AdapterError;
use crate::ground::site::Size;
use crate::ground::stack::Adapter;

/// New structure of one layer: its rank and scale, and how it is made of the present one.
pub struct Rebuild {
    /// Rank and scale of the layer from now on.
    pub size: Size,
    /// Makes the structure of the present one; the site has the new size.
    pub make: MakeStructure,
}

/// A model that an allocation changes.
pub trait AllocatedModel {
    /// Its parameters.
    fn part(&self) -> &dyn Part;

    /// Replaces the values of parameters, row-major; they stay trained or frozen as they are.
    fn assign(&mut self, values: BTreeMap<ParamId, Tensor<1>>);

    /// Replaces the structures of the layers for which `ask` returns a change. Parameters that are new have ids of their
    /// own, and no optimizer state.
    fn rebuild(&mut self, ask: &mut dyn FnMut(&str, &Adapter) -> Option<Rebuild>) -> Result<(), AdapterError>;
}

/// A module whose adapter of one name is changed.
pub(super) struct Model<'a, M> {
    module: &'a mut M,
    adapter: &'a str,
}

impl<'a, M: Module> Model<'a, M> {
    pub fn new(module: &'a mut M, adapter: &'a str) -> Self {
        Self { module, adapter }
    }
}

impl<M: Module> AllocatedModel for Model<'_, M> {
    fn part(&self) -> &dyn Part {
        &*self.module
    }

    fn assign(&mut self, values: BTreeMap<ParamId, Tensor<1>>) {
        if !values.is_empty() {
            *self.module = self.module.clone().map(&mut Assign(values));
        }
    }

    fn rebuild(&mut self, ask: &mut dyn FnMut(&str, &Adapter) -> Option<Rebuild>) -> Result<(), AdapterError> {
        let ask = |path: &str, adapter: &Adapter| ask(path, adapter).map(|Rebuild { size, make }| (size, make));
        *self.module = rebuild(self.module.clone(), self.adapter, ask)?.0;
        Ok(())
    }
}

struct Assign(BTreeMap<ParamId, Tensor<1>>);

impl ModuleMapper for Assign {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(values) = self.0.remove(&param.id) else { return param };
        let (id, tensor, mapper) = param.consume();
        let (tracked, trained) = (tensor.device().is_autodiff(), tensor.is_require_grad());
        let value = values.without_autodiff().reshape(tensor.dims());
        let value = if tracked { Tensor::from_inner(value) } else { value };
        let value = if trained { value.require_grad() } else { value };
        Param::from_mapped_value(id, value, mapper)
    }
}
