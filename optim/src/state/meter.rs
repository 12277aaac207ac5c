//! Measuring the memory of optimizer states.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use burn::optim::{DynOptimizer, DynState, Optimizer, StateSink, StateSource};
use burn::tensor::Device;
use burn::tensor::kind::BridgeTensor;

use crate::state::store::{StateStore, StoreSlot, Stored};

/// Counts the bytes of all optimizer states during a step, without a copy of more than one parameter's state.
///
/// ```text
/// meter.start();  model = optimizer.step(lr, model, grads);  let bytes = meter.stop();
/// ```
#[derive(Clone, Debug, Default)]
pub struct StateMeter {
    counter: Arc<Counter>,
    store: StoreSlot,
}

#[derive(Debug, Default)]
struct Counter {
    running: AtomicBool,
    bytes: AtomicU64,
}

impl StateMeter {
    /// A meter that no optimizer reports to yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets an optimizer report to this meter.
    pub fn watch<O: Optimizer>(&self, optimizer: O) -> Metered<Stored<O>> {
        Metered { optimizer: self.store.redirect(optimizer), counter: self.counter.clone() }
    }

    /// Starts a measurement.
    pub fn start(&self) {
        self.counter.bytes.store(0, Ordering::Relaxed);
        self.counter.running.store(true, Ordering::Relaxed);
    }

    /// Ends it: bytes of the tensors in the states of all parameters that were stepped since [`StateMeter::start`].
    pub fn stop(&self) -> u64 {
        self.counter.running.store(false, Ordering::Relaxed);
        self.counter.bytes.load(Ordering::Relaxed)
    }

    /// Runs `work`, which writes a record of the optimizers that report here or reads one: their tensors go through `store`.
    pub fn through<R>(&self, store: Arc<Mutex<dyn StateStore>>, work: impl FnOnce() -> R) -> R {
        self.store.through(store, work)
    }
}

/// An optimizer that reports to a [`StateMeter`]; give it to
/// [`ModuleOptimizer::with_group`](burn::optim::ModuleOptimizer::with_group).
#[derive(Clone, Debug)]
pub struct Metered<O> {
    optimizer: O,
    counter: Arc<Counter>,
}

impl<O: Optimizer> DynOptimizer for Metered<Stored<O>> {
    fn step_dyn(
        &self,
        rank: usize,
        lr: f64,
        tensor: BridgeTensor,
        grad: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        let (tensor, state) = self.optimizer.step_dyn(rank, lr, tensor, grad, state);
        if let Some(state) = &state
            && self.counter.running.load(Ordering::Relaxed)
        {
            let mut sink = StateSink::default();
            self.optimizer.inner().state_flatten("", state, &mut sink);
            let bytes: usize = sink.tensors.iter().map(|(_, data)| data.as_bytes().len()).sum();
            self.counter.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        (tensor, state)
    }

    fn to_device_dyn(&self, state: DynState, device: &Device) -> DynState {
        self.optimizer.to_device_dyn(state, device)
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, out: &mut StateSink) {
        self.optimizer.state_flatten(prefix, state, out);
    }

    fn state_unflatten(
        &self,
        rank: usize,
        prefix: &str,
        source: &mut StateSource,
        device: &Device,
    ) -> Option<DynState> {
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
