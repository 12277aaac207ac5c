//! Base weights that an adapter folder brings along: an embedding or a head that was trained or enlarged together with the adapter, and
//! copies of weights that are adapted.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use lowrank_optim::ModulePath;

use crate::hub::write::is_transposed;

/// A parameter as files hold it.
struct Held {
    shape: Vec<usize>,
    values: Vec<f32>,
    adapted: bool,
}

/// Tensors of a folder by the paths of the parameters that they belong to.
pub(super) type Brought = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Part of the name of a copy of an adapted weight.
const COPY: &str = ".base_layer";
/// The tied head, and the embedding that serves as one.
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Replaces parameters of a module; `names` are those in the file behind the prefix. Returns the parameters that do not fit, by name.
pub(super) fn put<M: Module>(module: M, brought: Brought) -> (M, Vec<(String, String)>) {
    let mut parameters = Parameters::default();
    module.visit(&mut parameters);
    let held = parameters.held;
    let (mut problems, mut replacing) = (Vec::new(), BTreeMap::new());
    for (name, (shape, values)) in &brought {
        let path = name.replace(COPY, "");
        let own = held.get(&path);
        let tied = (path == HEAD && own.is_none()).then(|| brought.get(EMBEDDING).map(|(_, values)| values));
        let tied = tied.map(|other| other.or(held.get(EMBEDDING).map(|held| &held.values)));
        let problem = match (own, tied) {
            (Some(own), _) if own.shape != *shape => format!(
                "has shape {shape:?}, the model's {:?}: give the model whose vocabulary has the same size",
                own.shape
            ),
            (Some(own), _) if name.contains(COPY) => {
                if own.values == *values {
                    continue;
                }
                "is a copy of another base weight than the model's; give the model that the adapter was trained on"
                    .into()
            }
            (Some(own), _) if own.adapted => {
                "would replace a weight that carries an adapter; give this folder first".into()
            }
            (Some(_), _) => {
                replacing.insert(path, (shape.clone(), values.clone()));
                continue;
            }
            (None, Some(Some(embedding))) if embedding == values => continue,
            (None, Some(_)) => "differs from the embedding, which serves as head in this model".into(),
            (None, None) => "has no place: the model has no such layer or weight, or the adapter no such tensor".into(),
        };
        problems.push((name.clone(), problem));
    }
    if replacing.is_empty() || !problems.is_empty() {
        return (module, problems);
    }
    (module.map(&mut Put { path: ModulePath::default(), replacing }), problems)
}

/// Returns true if a name, after the prefix, is that of a plain weight or of its copy, not of an adapter's tensor.
pub(super) fn is_plain(name: &str) -> bool {
    let stem = name.strip_suffix(".weight").unwrap_or_default();
    !stem.is_empty() && !["lora_", "vera_", "randlora_", "miss_", "bone_"].iter().any(|part| name.contains(part))
}

#[derive(Default)]
struct Parameters {
    path: ModulePath,
    held: BTreeMap<String, Held>,
    adapted: usize,
}

impl ModuleVisitor for Parameters {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.adapted += usize::from(container == "Reparameterization");
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.adapted -= usize::from(container == "Reparameterization");
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.base().inner();
        let mut shape = tensor.dims().to_vec();
        if is_transposed(&self.path, D) {
            shape.reverse();
        }
        let tensor = if is_transposed(&self.path, D) { tensor.swap_dims(0, 1) } else { tensor };
        let values = tensor.into_data().convert::<f32>().try_into_vec().unwrap_or_default();
        self.held.insert(self.path.joined(), Held { shape, values, adapted: self.adapted > 0 });
    }
}

struct Put {
    path: ModulePath,
    replacing: Brought,
}

impl ModuleMapper for Put {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((shape, values)) = self.replacing.remove(&self.path.joined()) else { return param };
        let device = param.val().device();
        let transposed = is_transposed(&self.path, D);
        param.map(|_| {
            let tensor = Tensor::<D>::from_data(TensorData::new(values, shape), (&device, DType::F32));
            if transposed { tensor.swap_dims(0, 1) } else { tensor }
        })
    }
}
