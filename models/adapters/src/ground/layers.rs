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
    /// True for a table whose rows are looked up, `[rows, width]`: a linear layer of inputs with a single 1.
    pub embedding: bool,
}

/// Paths of a module's layers that adapters can be attached to: linear layers and embeddings.
pub fn linear_layers<M: Module>(module: &M) -> Result<BTreeSet<String>, AdapterError> {
    Ok(ids_of(module)?.into_values().collect())
}

/// Linear layers of a module by the ids of their weights.
pub(crate) fn ids_of<M: Module>(module: &M) -> Result<BTreeMap<ParamId, String>, AdapterError> {
    Ok(adaptable_weights(module)?.into_iter().map(|(id, layer)| (id, layer.path)).collect())
}

/// Linear weights of a module by their ids, without embeddings.
pub fn linear_weights<M: Module>(module: &M) -> Result<BTreeMap<ParamId, LinearLayer>, AdapterError> {
    let mut weights = adaptable_weights(module)?;
    weights.retain(|_, layer| !layer.embedding);
    Ok(weights)
}

/// Weights of a module that adapters can be attached to, by their ids.
pub(crate) fn adaptable_weights<M: Module>(module: &M) -> Result<BTreeMap<ParamId, LinearLayer>, AdapterError> {
    #[derive(Default)]
    struct Finder {
        path: ModulePath,
        weights: Vec<(ParamId, String, [usize; 2], bool)>,
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
                [d_in, d_out] => {
                    self.weights.push((param.id, layer_of(&path).to_string(), [*d_in, *d_out], embedding));
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
    let layer = |(id, path, shape, embedding): (ParamId, String, _, _)| {
        let bias = finder.vectors.contains(&format!("{path}.bias"));
        (id, LinearLayer { path, shape, bias, embedding })
    };
    Ok(finder.weights.into_iter().map(layer).collect())
}

/// Biases of a module by path.
pub fn biases<M: Module>(module: &M) -> BTreeMap<String, ParamId> {
    #[derive(Default)]
    struct Walk {
        path: ModulePath,
        found: BTreeMap<String, ParamId>,
    }
    impl ModuleVisitor for Walk {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.path.joined();
            if D == 1 && path.ends_with(".bias") {
                self.found.insert(path, param.id);
            }
        }
    }
    let mut walk = Walk::default();
    module.visit(&mut walk);
    walk.found
}

/// Parameters of the modules whose paths end with one of these names, by path. Rejects a name without a module.
pub fn saved_parameters<M: Module>(module: &M, names: &[String]) -> Result<BTreeMap<String, ParamId>, AdapterError> {
    struct Walk<'a> {
        path: ModulePath,
        names: &'a [String],
        met: BTreeSet<&'a String>,
        found: BTreeMap<String, ParamId>,
        depth: usize,
    }
    impl ModuleVisitor for Walk<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
            self.depth += usize::from(container == "Reparameterization");
        }

        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit();
            self.depth -= usize::from(container == "Reparameterization");
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.path.joined();
            let modules = path.match_indices('.').map(|(dot, _)| &path[..dot]);
            let own = |name: &&String| {
                let ends = |module: &str| module == name.as_str() || module.ends_with(&format!(".{name}"));
                self.depth == 0 && modules.clone().any(ends)
            };
            // Several names may be of one module.
            for name in self.names.iter().filter(own) {
                self.met.insert(name);
                self.found.insert(path.clone(), param.id);
            }
        }
    }
    let start = BTreeMap::new();
    let mut walk = Walk { path: ModulePath::default(), names, met: BTreeSet::new(), found: start, depth: 0 };
    module.visit(&mut walk);
    match names.iter().find(|name| !walk.met.contains(name)) {
        None => Ok(walk.found),
        Some(name) => Err(AdapterError::Setting {
            key: "adapter.modules_to_save".into(),
            value: name.clone(),
            reason: "no module of the model has this name; a head that shares the table of the embedding is trained with embed_tokens".into(),
        }),
    }
}
