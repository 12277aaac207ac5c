//! The search: logits learn from held-out data, factors from the training data.

use std::collections::BTreeMap;
use std::fmt;

use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Bytes, Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_optim::{AdamWConfig, HookError, Losses, Part};

use super::grid::{LayerGrid, layer_weights, logit_gradients, selected_layers};
use super::options::{DiffoRa, SearchOrder};
use crate::allocation::values::{Put, put};
use crate::ground::error::AdapterError;
use crate::ground::stack::each_adapter;
use crate::structures::Diffora;

/// Size of the finite difference, over the norm of the gradient it goes along.
const DIFFERENCE: f64 = 0.01;

/// Layers with weights, as a search sees them.
pub struct DifforaSearch {
    options: DiffoRa,
    name: String,
    grid: LayerGrid,
    optimizer: ModuleOptimizer,
}

/// One layer of the search.
pub(super) struct Layer {
    pub path: String,
    pub structure: Diffora,
}

/// Layers of an adapter in the order of the module.
pub(super) fn layers(part: &dyn Part, name: &str) -> Vec<Layer> {
    let mut found = Vec::new();
    each_adapter(part, |path, stack| {
        let own = stack.stack.iter().find(|adapter| adapter.control().name() == name);
        if let Some(structure) = own.and_then(|adapter| adapter.structure.downcast_ref::<Diffora>()) {
            found.push(Layer { path: path.to_string(), structure: structure.clone() });
        }
    });
    found
}

fn vector(value: f64, like: &Diffora) -> Tensor<1> {
    let device = like.gamma.val().without_autodiff().device();
    Tensor::from_data(TensorData::new(vec![value as f32], [1]), &device)
}

impl fmt::Debug for DifforaSearch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DifforaSearch")
            .field("options", &self.options)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl DifforaSearch {
    /// Creates a search over the layers of the adapter of this name.
    pub fn new(options: DiffoRa, model: &dyn Part, name: &str) -> Result<Self, AdapterError> {
        let layers = layers(model, name);
        if layers.is_empty() {
            return Err(AdapterError::Refused(format!(
                "allocation diffora: the model has no adapter \"{name}\" of the structure diffora, whose weights it searches by; set adapter.name = diffora"
            )));
        }
        let grid = LayerGrid::new(layers.iter().map(|layer| layer.path.as_str()));
        let optimizer = AdamWConfig::new().with_weight_decay(options.wd_theta).init();
        Ok(Self { options, name: name.to_string(), grid, optimizer })
    }

    /// Logits of every row.
    pub fn logits(&self, part: &dyn Part) -> Vec<Vec<f64>> {
        in_rows(&self.grid, &logits(part, &self.name))
    }

    /// Weights of every row.
    pub fn weights(&self, part: &dyn Part) -> Vec<Vec<f64>> {
        layer_weights(&self.logits(part), self.options.relaxation)
    }

    /// Sets the weights of all layers to those of their logits.
    pub fn apply<M: Module>(&self, model: M) -> M {
        let weights: BTreeMap<&String, f64> =
            self.grid.rows().flatten().zip(self.weights(&model).into_iter().flatten()).collect();
        let mut values = GradientsParams::new();
        for layer in layers(&model, &self.name) {
            if let Some(weight) = weights.get(&layer.path) {
                values.register(layer.structure.gamma.id, vector(*weight, &layer.structure));
            }
        }
        put(model, values, Put::Instead)
    }

    /// Gradients of the logits of every row; see [`architecture_gradients`].
    pub fn gradients<M: Module>(
        &self,
        model: &M,
        xi: f64,
        losses: &mut dyn Losses<M>,
    ) -> Result<Vec<Vec<f64>>, HookError> {
        let xi = match self.options.order {
            SearchOrder::First => 0.0,
            SearchOrder::Second => self.options.xi.unwrap_or(xi),
        };
        let found = architecture_gradients(model, &self.name, xi, losses)?;
        Ok(logit_gradients(&self.logits(model), self.options.relaxation, &in_rows(&self.grid, &found)))
    }

    /// Returns the model after a step of the logits; the inner step of the second order is one of the learning rate `xi` where no other is set.
    pub fn step<M: Module>(&mut self, xi: f64, model: &M, losses: &mut dyn Losses<M>) -> Result<M, HookError> {
        let model = self.apply(model.clone());
        let gradients = self.gradients(&model, xi, losses)?;
        Ok(self.update(model, &gradients))
    }

    /// Updates the logits with their gradients, and the weights with them.
    pub fn update<M: Module>(&mut self, model: M, gradients: &[Vec<f64>]) -> M {
        let of: BTreeMap<&String, f64> = self.grid.rows().flatten().zip(gradients.iter().flatten().copied()).collect();
        let mut grads = GradientsParams::new();
        for layer in layers(&model, &self.name) {
            if let Some(gradient) = of.get(&layer.path) {
                grads.register(layer.structure.theta.id, vector(*gradient, &layer.structure));
            }
        }
        let model = self.optimizer.step(self.options.lr_theta, model, grads);
        self.apply(model)
    }

    /// Layers that keep an adapter of their own, in the order of the rows.
    pub fn selected(&self, part: &dyn Part) -> Vec<(String, bool)> {
        selection(&self.options, part, &self.name)
    }

    /// Moments of the logits, for a checkpoint.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self.optimizer.to_record().into_bytes() {
            Ok(bytes) => bytes.to_vec(),
            Err(error) => unreachable!("the state of an optimizer makes a record: {error}"),
        }
    }

    /// Restores the moments.
    pub fn load_bytes(&mut self, bytes: Vec<u8>) -> Result<(), HookError> {
        let record = OptimizerRecord::from_bytes(Bytes::from_bytes_vec(bytes))?;
        let fresh = AdamWConfig::new().with_weight_decay(self.options.wd_theta).init();
        self.optimizer = fresh.load_record(record);
        Ok(())
    }
}

fn logits(part: &dyn Part, name: &str) -> BTreeMap<String, f64> {
    let logit = |layer: Layer| {
        let value = host(layer.structure.theta.val().without_autodiff());
        (layer.path, f64::from(value[0]))
    };
    layers(part, name).into_iter().map(logit).collect()
}

fn in_rows(grid: &LayerGrid, values: &BTreeMap<String, f64>) -> Vec<Vec<f64>> {
    let row = |row: &[String]| row.iter().map(|path| values.get(path).copied().unwrap_or_default()).collect();
    grid.rows().map(row).collect()
}

/// Layers that the logits of an adapter select, in the order of the rows.
pub(super) fn selection(options: &DiffoRa, part: &dyn Part, name: &str) -> Vec<(String, bool)> {
    let DiffoRa { relaxation, rho, scope, .. } = *options;
    let grid = LayerGrid::new(layers(part, name).iter().map(|layer| layer.path.as_str()));
    let selected = selected_layers(&in_rows(&grid, &logits(part, name)), relaxation, rho, scope);
    grid.rows().flatten().cloned().zip(selected.into_iter().flatten()).collect()
}

/// Gradients of the held-out loss with respect to the weights of the layers, by path.
///
/// With `xi` above 0 of the second order: at the factors after a step of plain descent on the training loss, less the
/// derivative of that step by a finite difference along the gradient found there. The model is not changed.
pub fn architecture_gradients<M: Module>(
    model: &M,
    name: &str,
    xi: f64,
    losses: &mut dyn Losses<M>,
) -> Result<BTreeMap<String, f64>, HookError> {
    let layers = layers(model, name);
    let of_weights = |grads: &mut GradientsParams| -> BTreeMap<String, f64> {
        let of = |layer: &Layer| {
            let grad = grads.remove::<1>(layer.structure.gamma.id);
            (layer.path.clone(), grad.map_or(0.0, |grad| f64::from(host(grad)[0])))
        };
        layers.iter().map(of).collect()
    };
    let of_factors = |mut grads: GradientsParams| {
        let mut factors = GradientsParams::new();
        let mut squares = 0.0;
        for id in layers.iter().flat_map(|layer| [layer.structure.a.id, layer.structure.b.id]) {
            if let Some(grad) = grads.remove::<2>(id) {
                squares += host(grad.clone()).into_iter().map(|value| f64::from(value).powi(2)).sum::<f64>();
                factors.register(id, grad);
            }
        }
        (factors, squares.sqrt())
    };
    if xi == 0.0 {
        return Ok(of_weights(&mut losses.held_out(model)?));
    }
    let (step, _) = of_factors(losses.training(model)?);
    let ahead = put(model.clone(), step, Put::Plus(-xi));
    let mut grads = losses.held_out(&ahead)?;
    drop(ahead);
    let found = of_weights(&mut grads);
    let (along, norm) = of_factors(grads);
    if norm == 0.0 {
        return Ok(found);
    }
    let size = DIFFERENCE / norm;
    let mut beside = |sign: f64| -> Result<BTreeMap<String, f64>, HookError> {
        let mut copy = GradientsParams::new();
        for id in layers.iter().flat_map(|layer| [layer.structure.a.id, layer.structure.b.id]) {
            if let Some(grad) = along.get::<2>(id) {
                copy.register(id, grad);
            }
        }
        Ok(of_weights(&mut losses.training(&put(model.clone(), copy, Put::Plus(sign * size)))?))
    };
    let (above, below) = (beside(1.0)?, beside(-1.0)?);
    let second = |path: &String| (above[path] - below[path]) / (2.0 * size);
    Ok(found.iter().map(|(path, gradient)| (path.clone(), gradient - xi * second(path))).collect())
}
