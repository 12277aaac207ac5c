//! Records of optimizer states in pieces.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use burn::optim::{DynOptimizer, DynState, Optimizer, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, TensorData};

/// Destination and source of the tensors of optimizer states, instead of a record with all of them: no more than one parameter's state
/// is copied at a time. A record keeps the numbers in addition to the tensors.
pub trait StateStore: Send {
    /// Stores a tensor of a state.
    fn put(&mut self, name: String, data: TensorData);

    /// The tensors whose names start with this.
    fn get(&mut self, prefix: &str) -> Vec<(String, TensorData)>;
}

/// A store that is used by several optimizers.
type SharedStore = Arc<Mutex<dyn StateStore>>;

/// Handle of optimizers with the store that they use now.
#[derive(Clone, Default)]
pub struct StoreSlot(Arc<Mutex<Option<SharedStore>>>);

impl fmt::Debug for StoreSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreSlot").finish_non_exhaustive()
    }
}

impl StoreSlot {
    /// Lets an optimizer use the store of this handle.
    pub fn redirect<O: Optimizer>(&self, optimizer: O) -> Stored<O> {
        Stored { optimizer, slot: self.clone() }
    }

    /// Runs `work` while the optimizers of this handle use `store`.
    pub fn through<R>(&self, store: SharedStore, work: impl FnOnce() -> R) -> R {
        self.set(Some(store));
        let result = work();
        self.set(None);
        result
    }

    fn set(&self, store: Option<SharedStore>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = store;
    }

    fn with<R>(&self, work: impl FnOnce(&mut dyn StateStore) -> R) -> Option<R> {
        let store = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
        Some(work(&mut *store))
    }
}

/// An optimizer whose records go through the [`StateStore`] of its handle.
#[derive(Clone, Debug)]
pub struct Stored<O> {
    optimizer: O,
    slot: StoreSlot,
}

impl<O> Stored<O> {
    /// The optimizer.
    pub fn inner(&self) -> &O {
        &self.optimizer
    }
}

impl<O: Optimizer> DynOptimizer for Stored<O> {
    fn step_dyn(
        &self,
        rank: usize,
        lr: f64,
        tensor: BridgeTensor,
        grad: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        self.optimizer.step_dyn(rank, lr, tensor, grad, state)
    }

    fn to_device_dyn(&self, state: DynState, device: &Device) -> DynState {
        self.optimizer.to_device_dyn(state, device)
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, out: &mut StateSink) {
        let mut sink = StateSink::default();
        self.optimizer.state_flatten(prefix, state, &mut sink);
        out.scalars.append(&mut sink.scalars);
        let mut tensors = sink.tensors;
        self.slot.with(|store| tensors.drain(..).for_each(|(name, data)| store.put(name, data)));
        out.tensors.append(&mut tensors);
    }

    fn state_unflatten(
        &self,
        rank: usize,
        prefix: &str,
        source: &mut StateSource,
        device: &Device,
    ) -> Option<DynState> {
        let stored = self.slot.with(|store| store.get(&format!("{prefix}.")));
        for (name, data) in stored.into_iter().flatten() {
            source.insert_tensor(name, data);
        }
        self.optimizer.state_unflatten(rank, prefix, source, device)
    }
}
