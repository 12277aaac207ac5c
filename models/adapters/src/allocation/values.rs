//! Values of a module's parameters replaced by their ids.

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

/// Use of the given tensors.
#[derive(Clone, Copy, Debug)]
pub(super) enum Put {
    /// In place of the parameters' values.
    Instead,
    /// Times this factor, added to the parameters' values.
    Plus(f64),
}

/// Changes the parameters whose ids `values` has; tracking, ids and adapters stay.
pub(super) fn put<M: Module>(module: M, values: GradientsParams, how: Put) -> M {
    struct Change {
        values: GradientsParams,
        how: Put,
    }
    impl ModuleMapper for Change {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some(value) = self.values.remove::<D>(param.id) else { return param };
            let tracked = param.is_require_grad();
            let how = self.how;
            param.map(|old| {
                let autodiff = old.device().is_autodiff();
                let value = match how {
                    Put::Instead => value,
                    Put::Plus(factor) => old.without_autodiff() + value.mul_scalar(factor),
                };
                match autodiff {
                    true => value.autodiff().set_require_grad(tracked),
                    false => value,
                }
            })
        }
    }
    module.map(&mut Change { values, how })
}
