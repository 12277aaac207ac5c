//! Measuring the memory of optimizer states, and storing them in pieces.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use burn::optim::{DynOptimizer, DynState, Optimizer, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, TensorData};

/// Counts the bytes of all optimizer states during a step, without a copy of more than one parameter's state.
///
/// ```text
/// meter.start();  model = optimizer.step(lr, model, grads);  let bytes = meter.stop();
/// ```
#[derive(Clone, Debug, Default)]
pub struct StateMeter(Arc<Counter>);

#[derive(Default)]
struct Counter {
    running: AtomicBool,
    bytes: AtomicU64,
    store: Mutex<Option<Arc<Mutex<dyn StateStore>>>>,
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counter").field("running", &self.running).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Where the tensors of optimizer states go to and come from, instead of a record that holds them all: no more than one parameter's state is
/// copied at a time. A record keeps the numbers beside the tensors.
pub trait StateStore: Send {
    /// Takes a tensor of a state.
    fn put(&mut self, name: String, data: TensorData);

    /// The tensors whose names begin with this.
    fn get(&mut self, prefix: &str) -> Vec<(String, TensorData)>;
}

impl StateMeter {
    /// A meter that no optimizer reports to yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets an optimizer report to this meter.
    pub fn watch<O: Optimizer>(&self, optimizer: O) -> Metered<O> {
        Metered { optimizer, meter: self.clone(), lr_scale: 1.0 }
    }

    /// Begins a measurement.
    pub fn start(&self) {
        self.0.bytes.store(0, Ordering::Relaxed);
        self.0.running.store(true, Ordering::Relaxed);
    }

    /// Ends it: bytes of the tensors in the states of all parameters that were stepped since [`StateMeter::start`].
    pub fn stop(&self) -> u64 {
        self.0.running.store(false, Ordering::Relaxed);
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// What `work` writes into a record, or reads from one, of the optimizers that report here: their tensors go through `store`.
    pub fn through<R>(&self, store: Arc<Mutex<dyn StateStore>>, work: impl FnOnce() -> R) -> R {
        self.store(Some(store));
        let result = work();
        self.store(None);
        result
    }

    fn store(&self, store: Option<Arc<Mutex<dyn StateStore>>>) {
        *self.0.store.lock().unwrap_or_else(PoisonError::into_inner) = store;
    }

    fn with_store<R>(&self, work: impl FnOnce(&mut dyn StateStore) -> R) -> Option<R> {
        let store = self.0.store.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
        Some(work(&mut *store))
    }

    fn add<O: DynOptimizer>(&self, optimizer: &O, state: Option<&DynState>) {
        if let Some(state) = state
            && self.0.running.load(Ordering::Relaxed)
        {
            let mut sink = StateSink::default();
            optimizer.state_flatten("", state, &mut sink);
            let bytes: usize = sink.tensors.iter().map(|(_, data)| data.as_bytes().len()).sum();
            self.0.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

/// An optimizer that reports to a [`StateMeter`]; give it to
/// [`ModuleOptimizer::with_group`](burn::optim::ModuleOptimizer::with_group).
#[derive(Clone, Debug)]
pub struct Metered<O> {
    optimizer: O,
    meter: StateMeter,
    lr_scale: f64,
}

impl<O> Metered<O> {
    /// At this multiple of the learning rate of the step.
    pub fn at_rate(self, lr_scale: f64) -> Self {
        Self { lr_scale, ..self }
    }
}

impl<O: Optimizer> DynOptimizer for Metered<O> {
    fn step_dyn(
        &self,
        rank: usize,
        lr: f64,
        tensor: BridgeTensor,
        grad: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        let (tensor, state) = self.optimizer.step_dyn(rank, lr * self.lr_scale, tensor, grad, state);
        self.meter.add(&self.optimizer, state.as_ref());
        (tensor, state)
    }

    fn to_device_dyn(&self, state: DynState, device: &Device) -> DynState {
        self.optimizer.to_device_dyn(state, device)
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, out: &mut StateSink) {
        let mut sink = StateSink::default();
        self.optimizer.state_flatten(prefix, state, &mut sink);
        out.scalars.append(&mut sink.scalars);
        let mut tensors = sink.tensors;
        self.meter.with_store(|store| tensors.drain(..).for_each(|(name, data)| store.put(name, data)));
        out.tensors.append(&mut tensors);
    }

    fn state_unflatten(
        &self,
        rank: usize,
        prefix: &str,
        source: &mut StateSource,
        device: &Device,
    ) -> Option<DynState> {
        let stored = self.meter.with_store(|store| store.get(&format!("{prefix}.")));
        for (name, data) in stored.into_iter().flatten() {
            source.insert_tensor(name, data);
        }
        self.optimizer.state_unflatten(rank, prefix, source, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::ParamGroup;
    use burn::nn::LinearConfig;
    use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
    use burn::tensor::Tensor;

    #[test]
    fn counts_the_moments_of_every_parameter() {
        let device = Device::default().autodiff();
        let layer = LinearConfig::new(5, 3).init(&device);
        let meter = StateMeter::new();
        let adamw = AdamWConfig::new().build();
        let mut optimizer =
            ModuleOptimizer::from(adamw.clone()).with_group(ParamGroup::all(), meter.watch(adamw), None);
        let loss = layer.forward(Tensor::<2>::ones([2, 5], &device)).sum();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        meter.start();
        let layer = optimizer.step(0.1, layer, grads);
        assert_eq!(meter.stop(), 2 * 4 * (5 * 3 + 3));
        let loss = layer.forward(Tensor::<2>::ones([2, 5], &device)).sum();
        optimizer.step(0.1, layer.clone(), GradientsParams::from_grads(loss.backward(), &layer));
        assert_eq!(meter.stop(), 2 * 4 * (5 * 3 + 3), "a stopped meter counts nothing");
    }
}
