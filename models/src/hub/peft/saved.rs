//! Modules that are trained whole beside an adapter, such as a new classifier: `modules_to_save` of `peft`.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use lowrank_optim::ModulePath;

use super::folder::MODEL;
use crate::hub::write::is_transposed;
use crate::weights::host;

/// Trained parameters of a module that belong to no adapter.
#[derive(Default)]
pub(super) struct Saved {
    path: ModulePath,
    adapters: usize,
    /// Tensors under their names in the file.
    pub tensors: BTreeMap<String, TensorData>,
    /// Paths of the modules that they belong to.
    pub modules: BTreeSet<String>,
}

impl Saved {
    /// Collects them.
    pub fn of<M: Module>(module: &M) -> Self {
        let mut saved = Self::default();
        module.visit(&mut saved);
        saved
    }
}

impl ModuleVisitor for Saved {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.adapters += usize::from(container == "Reparameterization");
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.adapters -= usize::from(container == "Reparameterization");
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.adapters > 0 || !param.is_require_grad() {
            return;
        }
        let path = self.path.joined();
        let tensor = param.base().inner();
        let tensor = if is_transposed(&self.path, D) { tensor.swap_dims(0, 1) } else { tensor };
        let shape = tensor.dims();
        self.tensors.insert(format!("{MODEL}{path}"), TensorData::new(host(tensor), shape));
        self.modules.insert(path.rsplit_once('.').map_or(path.as_str(), |(module, _)| module).to_string());
    }
}

/// Returns true if a parameter with this name belongs to one of the modules, as `peft` compares them: by the end of the module's path.
pub(super) fn is_of(name: &str, modules: &[String]) -> bool {
    let module = name.rsplit_once('.').map_or("", |(module, _)| module);
    modules.iter().any(|saved| {
        module.strip_suffix(saved.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.'))
    })
}
