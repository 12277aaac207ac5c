//! The linear layers of a module.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use lowrank_optim::ModulePath;

use super::error::AdapterError;
use super::stack::{AdapterStack, layer_of};

/// Linear layer found in a model.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearLayer {
    /// Path of the layer.
    pub path: String,
    /// Shape `[d_in, d_out]`.
    pub shape: [usize; 2],
    /// True if the layer has a bias.
    pub bias: bool,
}

/// Paths of a module's linear layers that adapters can be attached to.
pub fn linear_layers<M: Module>(module: &M) -> Result<BTreeSet<String>, AdapterError> {
    Ok(ids_of(module)?.into_values().collect())
}

/// Linear layers of a module by the ids of their weights.
pub(crate) fn ids_of<M: Module>(module: &M) -> Result<BTreeMap<ParamId, String>, AdapterError> {
    Ok(linear_weights(module)?.into_iter().map(|(id, layer)| (id, layer.path)).collect())
}

/// Linear weights of a module by their ids.
pub fn linear_weights<M: Module>(module: &M) -> Result<BTreeMap<ParamId, LinearLayer>, AdapterError> {
    #[derive(Default)]
    struct Finder {
        path: ModulePath,
        weights: Vec<(ParamId, String, [usize; 2])>,
        vectors: Vec<String>,
        depth: usize,
        foreign: Option<String>,
    }
    impl ModuleVisitor for Finder {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
            if container == "Reparameterization" {
                self.depth += 1;
                if name != <AdapterStack as burn::module::Reparameterization>::NAME {
                    self.foreign = Some(format!("{} ({name})", self.path.joined()));
                }
            }
        }

        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit();
            self.depth -= usize::from(container == "Reparameterization");
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.depth > 0 {
                return;
            }
            let path = self.path.joined();
            let embedding = self.path.containers().any(|container| container.ends_with(":Embedding"));
            match param.lazy_shape().as_slice() {
                [d_in, d_out] if !embedding => {
                    self.weights.push((param.id, layer_of(&path).to_string(), [*d_in, *d_out]));
                }
                _ => self.vectors.push(path),
            }
        }
    }
    let mut finder = Finder::default();
    module.visit(&mut finder);
    if let Some(path) = finder.foreign {
        return Err(AdapterError::Refused(format!(
            "{path} carries an adapter of another kind; Burn would keep that one and drop the new one: merge or remove it first"
        )));
    }
    let with_bias = |path: String, shape| {
        let bias = finder.vectors.contains(&format!("{path}.bias"));
        LinearLayer { path, shape, bias }
    };
    Ok(finder.weights.into_iter().map(|(id, path, shape)| (id, with_bias(path, shape))).collect())
}
