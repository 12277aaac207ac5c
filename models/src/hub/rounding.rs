//! Rounding of a model's values by the types of a file.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, bf16, f16};
use lowrank_kernels::narrow::packed::holds_codes;
use lowrank_kernels::ops;
use lowrank_optim::ModulePath;

use super::file_type::{FileType, FileTypes};
use crate::weights::host;

/// Difference between the values of a model's matrices and those of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundingCost {
    /// Sum of the squares of all values.
    squares: f64,
    /// Sum of the squares of all differences.
    lost: f64,
    /// Largest difference.
    pub largest: f64,
}

impl RoundingCost {
    /// Returns the cost of writing the matrices of a model in these types.
    pub fn of<M: Module>(model: &M, types: &FileTypes) -> Self {
        let mut measure = Measure { path: ModulePath::default(), types, cost: Self::default() };
        model.visit(&mut measure);
        measure.cost
    }

    /// Root of the mean square of the differences, as a share of that of the values.
    pub fn relative(&self) -> f64 {
        if self.squares > 0.0 { (self.lost / self.squares).sqrt() } else { 0.0 }
    }
}

struct Measure<'a> {
    path: ModulePath,
    types: &'a FileTypes,
    cost: RoundingCost,
}

impl ModuleVisitor for Measure<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if D != 2 {
            return;
        }
        let kind = self.types.get(&self.path.joined());
        for x in host(param.base().without_autodiff()) {
            let after = match kind {
                FileType::F32 => x,
                FileType::F16 => f16::from_f32(x).to_f32(),
                FileType::BF16 => bf16::from_f32(x).to_f32(),
            };
            let (x, lost) = (f64::from(x), f64::from(x) - f64::from(after));
            self.cost.squares += x * x;
            self.cost.lost += lost * lost;
            self.cost.largest = self.cost.largest.max(lost.abs());
        }
    }
}

/// The same module with the values of matrices in codes.
pub fn without_codes<M: Module>(module: M) -> M {
    struct Restore;
    impl ModuleMapper for Restore {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if D != 2 || !holds_codes(&param.val()) {
                return param;
            }
            let (id, tensor, mapper) = param.consume();
            let values = ops::widened(Tensor::from_dispatch(tensor.into_dispatch()));
            Param::from_mapped_value(id, Tensor::from_dispatch(values.into_dispatch()), mapper)
        }
    }
    module.map(&mut Restore)
}
