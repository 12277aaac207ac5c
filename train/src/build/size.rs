//! Bytes and parameters of a model.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};
use lowrank_kernels::narrow::packed::stored_bytes;
use lowrank_optim::ModulePath;

/// Sizes of the tensors of a model.
#[derive(Default)]
pub struct Size {
    path: ModulePath,
    /// Bytes of each tensor by its path.
    pub tensors: Vec<(String, u64)>,
    /// Number of trained parameters.
    pub trained: u64,
}

impl Size {
    /// Measures a model.
    pub fn of<M: Module>(model: &M) -> Self {
        let mut size = Self::default();
        model.visit(&mut size);
        size
    }
}

impl ModuleVisitor for Size {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // `val` would compose the weight of an adapted layer.
        let tensor = param.base();
        let values = tensor.shape().num_elements();
        self.tensors.push((self.path.joined(), stored_bytes(&tensor) as u64));
        self.trained += if param.is_require_grad() { values as u64 } else { 0 };
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.val();
        self.tensors.push((self.path.joined(), (tensor.shape().num_elements() * tensor.dtype().size()) as u64));
    }
}
