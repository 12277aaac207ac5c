//! Base weights that an adapter folder brings along: modules that were trained whole or enlarged together with the adapter, rows of an
//! embedding, biases, and copies of weights that are adapted.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use lowrank_optim::ModulePath;

use super::layout::Layout;
use crate::hub::write::is_transposed;

/// A parameter as files hold it.
pub(super) struct Held {
    pub shape: Vec<usize>,
    /// Values, if they were asked for.
    pub values: Option<Vec<f32>>,
    adapted: bool,
}

/// Rows of a table that replace those of the model.
pub(super) struct Rows {
    /// Numbers of the rows.
    pub of: Vec<usize>,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Tensors of a folder by their names in the file behind the prefix.
#[derive(Default)]
pub(super) struct Brought {
    pub whole: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// By the paths of the modules.
    pub rows: BTreeMap<String, Rows>,
}

/// Part of the name of a copy of an adapted weight, or of the trained bias of an adapted layer.
pub(super) const COPY: &str = ".base_layer";
/// End of the name of rows that replace those of a module.
pub(super) const ROWS: &str = ".token_adapter.trainable_tokens_delta";
/// The tied head, and the embedding that serves as one.
pub(super) const HEAD: &str = "lm_head.weight";
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Returns true if a tensor is a copy of an adapted weight.
pub(super) fn is_copy(name: &str) -> bool {
    name.ends_with(".weight") && name.contains(COPY)
}

/// The module that rows belong to, by the name of the tensor.
pub(super) fn module_of_rows(name: &str) -> Option<&str> {
    let at = name.find(ROWS)?;
    let (module, end) = (&name[..at], &name[at + ROWS.len()..]);
    // The name of an adapter may follow.
    (end.is_empty() || end.starts_with('.') && !end[1..].contains('.')).then_some(module)
}

/// Returns true if a name, after the prefix, is that of a plain parameter, of its copy or of its rows, not of an adapter's tensor.
pub(super) fn is_plain(name: &str) -> bool {
    let end = [".weight", ".bias"].iter().any(|end| name.strip_suffix(end).is_some_and(|stem| !stem.is_empty()));
    module_of_rows(name).is_some() || end && !name.split('.').any(Layout::is_of_adapter)
}

impl Brought {
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.rows.is_empty()
    }
}

/// Replaces parameters of a module. Returns those that do not fit, by name.
pub(super) fn put<M: Module>(module: M, brought: Brought) -> (M, Vec<(String, String)>) {
    let weight = |path: &str| format!("{path}.weight");
    let copies = brought.whole.keys().filter(|name| name.contains(COPY)).map(|name| name.replace(COPY, ""));
    let wanted = copies.chain(brought.rows.keys().map(|path| weight(path))).chain([EMBEDDING.to_string()]);
    let held = Parameters::of(&module, Some(wanted.collect()));
    let (mut problems, mut replacing) = (Vec::new(), BTreeMap::new());
    for (name, (shape, values)) in &brought.whole {
        let path = name.replace(COPY, "");
        let own = held.get(&path);
        let tied = (path == HEAD && own.is_none()).then(|| brought.whole.get(EMBEDDING).map(|(_, values)| values));
        let tied = tied.map(|other| other.or(held.get(EMBEDDING).and_then(|held| held.values.as_ref())));
        let problem = match (own, tied) {
            (Some(own), _) if own.shape != *shape => format!(
                "has shape {shape:?}, the model's {:?}: give the model whose vocabulary has the same size",
                own.shape
            ),
            (Some(own), _) if name.contains(COPY) && name.ends_with(".weight") => {
                if own.values.as_ref() == Some(values) {
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
    for (path, rows) in brought.rows {
        let (name, own) = (format!("{path}{ROWS}"), weight(&path));
        match held.get(&own) {
            Some(held) if !replacing.contains_key(&own) => match with_rows(held, &rows) {
                Ok(values) => drop(replacing.insert(own, (held.shape.clone(), values))),
                Err(problem) => problems.push((name, problem)),
            },
            Some(_) => problems.push((name, "is in the file besides the whole module".into())),
            None => problems.push((name, "has no place: the model has no such module".into())),
        }
    }
    if replacing.is_empty() || !problems.is_empty() {
        return (module, problems);
    }
    (module.map(&mut Put { path: ModulePath::default(), replacing }), problems)
}

/// The values of a table with some of its rows replaced.
fn with_rows(held: &Held, rows: &Rows) -> Result<Vec<f32>, String> {
    let ([count, width], Some(values)) = (held.shape.as_slice(), &held.values) else {
        return Err("belongs to a module that has no rows".into());
    };
    let (count, width) = (*count, *width);
    if rows.shape != [rows.of.len(), width] {
        return Err(format!(
            "has shape {:?}; trainable_token_indices and the model ask for {:?}",
            rows.shape,
            [rows.of.len(), width]
        ));
    }
    if held.adapted {
        return Err("would replace rows of a weight that carries an adapter; give this folder first".into());
    }
    let mut values = values.clone();
    for (row, new) in rows.of.iter().zip(rows.values.chunks(width.max(1))) {
        if *row >= count {
            return Err(format!("has row {row}; the model has {count}, from 0: give the model with the added tokens"));
        }
        values[row * width..][..width].copy_from_slice(new);
    }
    Ok(values)
}

/// The parameters of a module as files hold them, by path; with the values of those that are asked for, or of all.
#[derive(Default)]
pub(super) struct Parameters {
    path: ModulePath,
    held: BTreeMap<String, Held>,
    adapted: usize,
    wanted: Option<BTreeSet<String>>,
}

impl Parameters {
    pub fn of<M: Module>(module: &M, wanted: Option<BTreeSet<String>>) -> BTreeMap<String, Held> {
        let mut parameters = Self { wanted, ..Self::default() };
        module.visit(&mut parameters);
        parameters.held
    }
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
        let path = self.path.joined();
        let transposed = is_transposed(&self.path, D);
        let mut shape = param.lazy_shape().as_slice().to_vec();
        if transposed {
            shape.reverse();
        }
        let asked = self.wanted.as_ref().is_none_or(|wanted| wanted.contains(&path));
        let values = asked.then(|| {
            let tensor = param.base().inner();
            let tensor = if transposed { tensor.swap_dims(0, 1) } else { tensor };
            tensor.into_data().convert::<f32>().try_into_vec().unwrap_or_default()
        });
        self.held.insert(path, Held { shape, values, adapted: self.adapted > 0 });
    }
}

struct Put {
    path: ModulePath,
    replacing: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
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
