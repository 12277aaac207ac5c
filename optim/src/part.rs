//! A module, or a part of one, behind a pointer.
//!
//! Burn's `Module` and `ModuleVisitor` have generic methods, so that neither can be a trait object. A [`Part`] can: a hook that looks at the
//! parameters of one block does not depend on the type of the block.

use std::any::Any;

use burn::module::{Flag, Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Bool, Float, Gradients, Int, Tensor};

/// Parameters that a visitor can walk: those of a module, or of one of its segments.
pub trait Part {
    /// Passes every parameter to a visitor; `walk` takes any `ModuleVisitor`.
    fn visit_part(&self, visitor: &mut dyn PartVisitor);
}

impl dyn Part + '_ {
    /// Passes every parameter to a module visitor.
    pub fn walk<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.visit_part(visitor);
    }

    /// The gradients of the part's trained parameters, as `GradientsParams::from_grads` returns them for a module.
    pub fn gradients(&self, grads: Gradients) -> GradientsParams {
        struct Take {
            grads: Gradients,
            taken: GradientsParams,
        }
        impl ModuleVisitor for Take {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                // Asking for the gradient of a tensor outside of autodiff would panic.
                if param.is_require_grad()
                    && let Some(grad) = param.val().grad_remove(&mut self.grads)
                {
                    self.taken.register(param.id, grad);
                }
            }
        }
        let mut take = Take { grads, taken: GradientsParams::new() };
        self.walk(&mut take);
        take.taken
    }

    /// Reports whether any of its tensors is trained.
    pub fn is_trained(&self) -> bool {
        struct Trained(bool);
        impl ModuleVisitor for Trained {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0 |= param.is_require_grad();
            }
        }
        let mut trained = Trained(false);
        self.walk(&mut trained);
        trained.0
    }
}

impl<M: Module> Part for M {
    fn visit_part(&self, visitor: &mut dyn PartVisitor) {
        self.visit(&mut ByPointer(visitor));
    }
}

/// A `ModuleVisitor` as a trait object, implemented for all of them.
pub trait PartVisitor {
    /// As [`ModuleVisitor::enter_module`].
    fn enter(&mut self, name: &str, container: &str);
    /// As [`ModuleVisitor::exit_module`].
    fn exit(&mut self, name: &str, container: &str);
    /// As [`ModuleVisitor::visit_float`], with a `Param<Tensor<D>>`.
    fn float(&mut self, param: &dyn Any);
    /// As [`ModuleVisitor::visit_int`], with a `Param<Tensor<D, Int>>`.
    fn int(&mut self, param: &dyn Any);
    /// As [`ModuleVisitor::visit_bool`], with a `Param<Tensor<D, Bool>>`.
    fn bool(&mut self, param: &dyn Any);
    /// As [`ModuleVisitor::visit_flag`].
    fn flag(&mut self, flag: &Param<Flag>);
}

/// Passes a parameter of unknown rank to the method of its rank.
macro_rules! of_rank {
    ($visitor:ident.$method:ident($param:ident: $kind:ty) for $($rank:literal)*) => {
        $(if let Some(param) = $param.downcast_ref::<Param<Tensor<$rank, $kind>>>() {
            return $visitor.$method(param);
        })*
    };
}

impl<V: ModuleVisitor> PartVisitor for V {
    fn enter(&mut self, name: &str, container: &str) {
        self.enter_module(name, container);
    }

    fn exit(&mut self, name: &str, container: &str) {
        self.exit_module(name, container);
    }

    fn float(&mut self, param: &dyn Any) {
        of_rank!(self.visit_float(param: Float) for 2 1 3 4 5 6 7 8);
    }

    fn int(&mut self, param: &dyn Any) {
        of_rank!(self.visit_int(param: Int) for 2 1 3 4 5 6 7 8);
    }

    fn bool(&mut self, param: &dyn Any) {
        of_rank!(self.visit_bool(param: Bool) for 2 1 3 4 5 6 7 8);
    }

    fn flag(&mut self, flag: &Param<Flag>) {
        self.visit_flag(flag);
    }
}

/// A trait object as a `ModuleVisitor`, for [`Part`]s that have modules inside of them.
pub struct ByPointer<'a>(pub &'a mut dyn PartVisitor);

impl ModuleVisitor for ByPointer<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.0.enter(name, container);
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.0.exit(name, container);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.float(param);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.0.int(param);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.0.bool(param);
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.0.flag(flag);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::conv::{Conv2d, Conv2dConfig};
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    #[derive(Module, Debug)]
    struct Two {
        linear: Linear,
        conv: Conv2d,
    }

    #[derive(Default)]
    struct Seen(Vec<(String, usize)>);

    impl ModuleVisitor for Seen {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push((name.to_string(), 0));
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push((param.id.to_string(), D));
        }
    }

    #[test]
    fn a_part_shows_what_its_module_shows_and_takes_the_same_gradients() {
        let device = Device::default().autodiff();
        let module = Two {
            linear: LinearConfig::new(3, 2).init(&device),
            conv: Conv2dConfig::new([1, 2], [2, 2]).init(&device),
        };
        let part: &dyn Part = &module;
        let (mut direct, mut erased) = (Seen::default(), Seen::default());
        module.visit(&mut direct);
        part.walk(&mut erased);
        assert!(direct.0.iter().any(|(_, rank)| *rank == 4));
        assert_eq!(direct.0, erased.0);

        let loss = || module.linear.forward(Tensor::<2>::ones([4, 3], &device)).square().sum();
        let whole = GradientsParams::from_grads(loss().backward(), &module);
        let taken = part.gradients(loss().backward());
        assert_eq!((whole.len(), taken.len()), (2, 2));
        let id = module.linear.weight.id;
        assert_eq!(whole.get::<2>(id).unwrap().into_data(), taken.get::<2>(id).unwrap().into_data());
        assert!(part.is_trained());
        let frozen = module.no_grad();
        assert!(!(&frozen as &dyn Part).is_trained());
    }
}
