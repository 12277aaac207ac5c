//! Run-time state that all layers of one adapter share: switch, forward pass, totals.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use burn::tensor::Tensor;

use super::config::AdapterConfig;
use super::pass::PassInfo;
use super::structure::Totals;

/// Handle of an adapter, the same in all its layers and in clones of the model.
#[derive(Clone, Debug)]
pub struct Control(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: AdapterConfig,
    on: AtomicBool,
    pass: RwLock<Arc<PassInfo>>,
    values: RwLock<BTreeMap<String, f64>>,
    totals: RwLock<Totals>,
    weights: RwLock<Option<RowWeights>>,
}

/// Weights of an adapter for the rows of a pass, `[rows, 1]` by the path of the layer.
pub type RowWeights = Arc<BTreeMap<String, Tensor<2>>>;

impl Control {
    pub(crate) fn new(config: AdapterConfig) -> Self {
        Self(Arc::new(Inner {
            config,
            on: AtomicBool::new(true),
            pass: RwLock::default(),
            values: RwLock::default(),
            totals: RwLock::default(),
            weights: RwLock::default(),
        }))
    }

    /// Configuration of the adapter.
    pub fn config(&self) -> &AdapterConfig {
        &self.0.config
    }

    /// Name of the adapter.
    pub fn name(&self) -> &str {
        &self.0.config.name
    }

    /// Switches the adapter on or off in all its layers; when off, the model reproduces the base bit for bit.
    pub fn switch(&self, on: bool) {
        self.0.on.store(on, Ordering::Relaxed);
    }

    /// Returns true if the adapter is on.
    pub fn is_on(&self) -> bool {
        self.0.on.load(Ordering::Relaxed)
    }

    /// Sets values that every training pass from now on carries, in addition to its own: a hook sets those of its step,
    /// whose passes the training loop makes.
    pub fn set_values(&self, values: BTreeMap<String, f64>) {
        *self.0.values.write().unwrap_or_else(PoisonError::into_inner) = values;
    }

    /// Sets the next forward pass; see [`PassInfo`].
    pub fn set_pass(&self, mut pass: PassInfo) {
        if pass.training {
            for (name, value) in &*self.0.values.read().unwrap_or_else(PoisonError::into_inner) {
                pass.values.entry(name.clone()).or_insert(*value);
            }
        }
        *self.0.pass.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(pass);
    }

    /// Next or running forward pass.
    pub fn pass(&self) -> Arc<PassInfo> {
        self.0.pass.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Weights the inputs of the branches row by row in the next passes, as mixtures of adapters do; none to stop. Structures
    /// with a branch alone take part: those of two factors.
    pub fn weigh(&self, weights: Option<RowWeights>) {
        *self.0.weights.write().unwrap_or_else(PoisonError::into_inner) = weights;
    }

    pub(crate) fn weights_of(&self, layer: &str) -> Option<Tensor<2>> {
        let weights = self.0.weights.read().unwrap_or_else(PoisonError::into_inner);
        weights.as_ref()?.get(layer).cloned()
    }

    /// Sums over all layers of the adapter.
    pub fn totals(&self) -> Totals {
        *self.0.totals.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_totals(&self, totals: Totals) {
        *self.0.totals.write().unwrap_or_else(PoisonError::into_inner) = totals;
    }
}
