//! Parameters multiplied by factors of their own.

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::Tensor;

/// The module with some of its parameters multiplied, which stay trained or frozen as they are.
pub(super) fn multiplied<M: Module>(module: M, factors: &[(ParamId, f64)]) -> M {
    struct Multiply<'a>(&'a [(ParamId, f64)]);
    impl ModuleMapper for Multiply<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some((_, factor)) = self.0.iter().find(|(id, _)| *id == param.id) else { return param };
            let (id, tensor, mapper) = param.consume();
            let (tracked, trained) = (tensor.device().is_autodiff(), tensor.is_require_grad());
            let value = tensor.without_autodiff().mul_scalar(*factor);
            let value = if tracked { Tensor::from_inner(value) } else { value };
            let value = if trained { value.require_grad() } else { value };
            Param::from_mapped_value(id, value, mapper)
        }
    }
    if factors.is_empty() { module } else { module.map(&mut Multiply(factors)) }
}
