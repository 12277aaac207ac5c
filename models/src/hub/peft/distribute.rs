//! Assignment of the tensors of a file to the layers of a model.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::TensorData;
use lowrank_adapters::{AdapterConfig, GivenTensors};

use super::folder::{MODEL, SHARED};
use super::layout::Layout;
use crate::error::ModelError;
use crate::hub::TensorFiles;

/// The tensors of a file, each assigned to its layer.
#[derive(Default)]
pub(super) struct Distributed {
    /// By layer and field.
    pub tensors: BTreeMap<String, GivenTensors>,
    /// Those that all layers share, by field.
    pub shared: GivenTensors,
    /// Names that do not fit, and why.
    pub problems: Vec<(String, String)>,
}

/// Destination of a tensor of the file.
enum Belongs {
    Layer(String, String),
    All(&'static str, Option<usize>),
}

/// Names of an adapter's tensors.
pub(super) struct TensorNames<'a> {
    pub config: &'a AdapterConfig,
    /// Layout of peft; none for the layout of this program.
    pub layout: Option<&'static Layout>,
    /// True if the file may hold the product that the base weights lack at the start.
    pub with_origin: bool,
}

impl TensorNames<'_> {
    /// Reads the tensors and assigns them to their layers.
    pub fn distribute(&self, files: &mut TensorFiles, layers: &BTreeSet<String>) -> Result<Distributed, ModelError> {
        let Distributed { mut tensors, mut shared, mut problems } = Distributed::default();
        let names: Vec<(String, Vec<usize>)> =
            files.shapes().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect();
        for (name, shape) in names {
            let Some(place) = self.place(&name, layers) else {
                let reason = "does not fit: the model has no such layer, or the adapter no such tensor";
                problems.push((name, reason.into()));
                continue;
            };
            let values = match &place {
                Belongs::Layer(_, field) if self.is_whole(field) => files.take_whole(&name, &shape)?,
                _ => files.take(&name, &shape)?,
            };
            match place {
                Belongs::Layer(path, field) => {
                    let layer: &mut GivenTensors = tensors.entry(path).or_default();
                    if layer.insert(field, TensorData::new(values, shape)).is_some() {
                        problems.push((name, "is in the file twice, under the names of two adapters".into()));
                    }
                }
                Belongs::All(field, axis) => {
                    let mut shape = shape;
                    if let Some(axis) = axis.filter(|axis| shape.get(*axis) == Some(&1)) {
                        shape.remove(axis);
                    }
                    let data = TensorData::new(values, shape);
                    match shared.get(field) {
                        None => {
                            shared.insert(field.to_string(), data);
                        }
                        // peft may write what layers share once for each of them.
                        Some(first) if *first == data => {}
                        Some(_) => problems.push((name, "differs between layers, which share it".into())),
                    }
                }
            }
        }
        if let Some(folded) = self.layout.and_then(|layout| layout.folded.as_ref()) {
            for (path, layer) in &mut tensors {
                if let Err(reason) = (folded.tensors)(layer) {
                    problems.push((format!("{MODEL}{path}.*"), reason));
                }
            }
        }
        for (field, name, _) in self.layout.iter().flat_map(|layout| layout.shared) {
            if !shared.contains_key(*field) {
                let reason = "is missing; it cannot be recomputed from its seed: let peft save with save_projection";
                problems.push((format!("{SHARED}{name}"), reason.into()));
            }
        }
        Ok(Distributed { tensors, shared, problems })
    }

    /// Returns true if a field holds whole numbers.
    fn is_whole(&self, field: &str) -> bool {
        self.layout.is_some_and(|layout| layout.whole.contains(&field))
    }

    fn place(&self, name: &str, layers: &BTreeSet<String>) -> Option<Belongs> {
        let path = name.strip_prefix(MODEL).and_then(|inner| {
            let dots = inner.match_indices('.').map(|(dot, _)| dot);
            dots.rev().find(|dot| layers.contains(&inner[..*dot])).map(|dot| (&inner[..dot], &inner[dot + 1..]))
        });
        let Some((path, rest)) = path else {
            let (field, axis) = self.layout?.shared_field(name.strip_prefix(SHARED)?)?;
            return Some(Belongs::All(field, axis));
        };
        let belongs = |field: &str| Some(Belongs::Layer(path.to_string(), field.to_string()));
        if let ("origin.a" | "origin.b", true) = (rest, self.with_origin) {
            return belongs(rest);
        }
        match self.layout {
            Some(layout) => match (layout.field(rest), layout.shared_field(rest)) {
                (Some(field), _) => belongs(field),
                (None, Some((field, axis))) => Some(Belongs::All(field, axis)),
                (None, None) => None,
            },
            None => self.config.entry().ok()?.spec.tensor(rest).and_then(|_| belongs(rest)),
        }
    }
}
