//! What all layers of one adapter have in common at run time: switch, dropout.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use burn::tensor::{DType, Tensor, TensorData};

use super::config::AdapterConfig;

/// Handle of an adapter, the same in all its layers and in clones of the model.
#[derive(Clone, Debug)]
pub struct Control(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: AdapterConfig,
    on: AtomicBool,
    /// Number of the forward pass in training, from 1; 0 outside of training.
    pass: AtomicU64,
}

impl Control {
    pub(super) fn new(config: AdapterConfig) -> Self {
        Self(Arc::new(Inner { config, on: AtomicBool::new(true), pass: AtomicU64::new(0) }))
    }

    /// What the adapter was asked to be.
    pub fn config(&self) -> &AdapterConfig {
        &self.0.config
    }

    /// Name of the adapter.
    pub fn name(&self) -> &str {
        &self.0.config.name
    }

    /// Switches the adapter on or off in all its layers; off, the model gives the bits of the base.
    pub fn switch(&self, on: bool) {
        self.0.on.store(on, Ordering::Relaxed);
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.0.on.load(Ordering::Relaxed)
    }

    /// Dropout on the branches' inputs.
    pub fn dropout(&self) -> f64 {
        self.0.config.dropout
    }

    /// Says which forward pass of the training comes next, counted from 1; dropout is off at 0. Masks follow from seed, layer and this number:
    /// a block that runs twice, or a run that is resumed, drops the same values.
    pub fn set_pass(&self, pass: u64) {
        self.0.pass.store(pass, Ordering::Relaxed);
    }

    /// Whether values are dropped in this pass.
    pub(super) fn drops(&self) -> bool {
        self.dropout() > 0.0 && self.0.pass.load(Ordering::Relaxed) > 0
    }

    /// What of `x [rows, n]` remains at a place of its own mask.
    pub(super) fn drop(&self, place: u64, x: &Tensor<2>) -> Tensor<2> {
        let pass = self.0.pass.load(Ordering::Relaxed);
        let shape = x.dims();
        let keep = 1.0 - self.dropout();
        let (limit, scale) = ((keep * 2f64.powi(32)) as u64, (1.0 / keep) as f32);
        let mut state = self.0.config.seed ^ place ^ pass.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut mask = Vec::with_capacity(shape[0] * shape[1] + 1);
        while mask.len() < shape[0] * shape[1] {
            let bits = next(&mut state);
            for half in [bits & 0xffff_ffff, bits >> 32] {
                mask.push(if half < limit { scale } else { 0.0 });
            }
        }
        mask.truncate(shape[0] * shape[1]);
        let plain = x.device().inner();
        x.clone() * Tensor::from_data(TensorData::new(mask, shape), (&plain, DType::F32))
    }
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
