//! The path of a parameter while a module is visited, and the id that follows from it.

use burn::module::ParamId;
use lowrank_kernels::random::key_of;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};

/// Names from the root of a module to the one that is visited. Variants of an enum are not named in it: the representation of a layer is
/// not part of its path.
#[derive(Clone, Debug, Default)]
pub struct ModulePath {
    names: Vec<Option<String>>,
    containers: Vec<String>,
}

impl ModulePath {
    /// For [`ModuleVisitor::enter_module`](burn::module::ModuleVisitor::enter_module).
    pub fn enter(&mut self, name: &str, container: &str) {
        self.names.push((!container.starts_with("Enum:")).then(|| name.to_string()));
        self.containers.push(container.to_string());
    }

    /// For [`ModuleVisitor::exit_module`](burn::module::ModuleVisitor::exit_module).
    pub fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    /// The names, joined with dots.
    pub fn joined(&self) -> String {
        self.names().collect::<Vec<_>>().join(".")
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().flatten().map(String::as_str)
    }

    /// Types of the modules along the path, such as `Struct:Embedding`.
    pub fn containers(&self) -> impl Iterator<Item = &str> {
        self.containers.iter().map(String::as_str)
    }

    /// Reports whether the path leads through a module of this name and type, such as `("lora", "Reparameterization")`.
    pub fn within(&self, name: &str, container: &str) -> bool {
        self.names.iter().zip(&self.containers).any(|(n, c)| n.as_deref() == Some(name) && c == container)
    }
}

/// A visitor of parameters with their paths; [`visit_parameters`] passes it through a module.
#[allow(unused_variables)]
pub trait ParameterVisitor {
    /// Visits a float parameter.
    fn float<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<D>>);

    /// Visits an integer parameter.
    fn int<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<D, Int>>) {}

    /// Leaves the module `name` of this type; `path` is that of the module around it.
    fn exit(&mut self, path: &ModulePath, name: &str, container: &str) {}
}

/// Visits the parameters of a module in its order.
pub fn visit_parameters<M: Module>(module: &M, visitor: &mut impl ParameterVisitor) {
    struct Walk<'a, V> {
        path: ModulePath,
        visitor: &'a mut V,
    }
    impl<V: ParameterVisitor> ModuleVisitor for Walk<'_, V> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, name: &str, container: &str) {
            self.path.exit();
            self.visitor.exit(&self.path, name, container);
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.visitor.float(&self.path, param);
        }

        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            self.visitor.int(&self.path, param);
        }
    }
    module.visit(&mut Walk { path: ModulePath::default(), visitor });
}

/// The id of the parameter at a path.
///
/// Ids are derived from paths so that optimizer state finds its parameter again after the weights went through a file that has no ids.
pub fn parameter_id(path: &str) -> ParamId {
    ParamId::from(key_of(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Lora;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    #[derive(Module, Debug)]
    struct Nested {
        layers: Vec<Linear>,
        chosen: Choice,
    }

    #[derive(Module, Debug)]
    enum Choice {
        One(Linear),
    }

    #[derive(Default)]
    struct Seen {
        floats: Vec<String>,
        adapters: Vec<String>,
        left: Vec<String>,
    }

    impl ParameterVisitor for Seen {
        fn float<const D: usize>(&mut self, path: &ModulePath, _param: &Param<Tensor<D>>) {
            let seen = if path.within("lora", "Reparameterization") { &mut self.adapters } else { &mut self.floats };
            seen.push(path.joined());
        }

        fn exit(&mut self, path: &ModulePath, name: &str, _container: &str) {
            self.left.push(format!("{} {name}", path.joined()));
        }
    }

    #[test]
    fn every_parameter_comes_with_its_path() {
        let layer = || LinearConfig::new(3, 2).with_bias(false).init(&Device::default());
        let module = Nested { layers: vec![layer()], chosen: Choice::One(layer()) };
        let mut seen = Seen::default();
        visit_parameters(&module, &mut seen);
        assert_eq!(seen.floats, ["layers.0.weight", "chosen.weight"]);
        assert!(seen.adapters.is_empty());
        assert_eq!(seen.left.last().map(String::as_str), Some(" chosen"));
        let mut seen = Seen::default();
        visit_parameters(&module.apply_lora(Lora::new(1, 1.0)), &mut seen);
        assert_eq!(seen.floats.len(), 2);
        assert_eq!(seen.adapters[..2], ["layers.0.weight.lora.a", "layers.0.weight.lora.b"]);
    }
}
