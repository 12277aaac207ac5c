//! Input of an adapted layer: the activations and their forward pass.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{DType, Tensor, TensorData};
use lowrank_optim::key_of;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Forward pass: its position in a run, and values specific to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassInfo {
    /// Number of the optimizer step, from 0.
    pub step: u64,
    /// Steps of the whole run; none if a time limit ends it.
    pub total: Option<u64>,
    /// Number of the micro-batch in its step, from 0.
    pub micro_batch: u64,
    /// Micro-batches of a step.
    pub micro_batches: u64,
    /// True in training; dropout is disabled otherwise.
    pub training: bool,
    /// Named values of this step, such as a rank or a sparsity.
    pub values: BTreeMap<String, f64>,
}

impl PassInfo {
    /// Creates a training pass of a step without micro-batches.
    pub fn training(step: u64, total: Option<u64>) -> Self {
        Self { step, total, micro_batches: 1, training: true, ..Self::default() }
    }

    /// Number of the pass in the run, from 1; 0 outside of training. Random draws depend only on it, so a recomputed
    /// block or a resumed run draws the same values.
    pub fn number(&self) -> u64 {
        if self.training { self.step * self.micro_batches + self.micro_batch + 1 } else { 0 }
    }
}

/// Input of a layer: `x [rows, d_in]` and its forward pass.
#[derive(Clone, Debug)]
pub struct Input {
    /// Unmodified input.
    pub x: Tensor<2>,
    /// The forward pass.
    pub pass: Arc<PassInfo>,
    /// Fraction of the branches' inputs that is dropped in training.
    pub(crate) dropout: f64,
    /// Seed of the adapter.
    pub(crate) seed: u64,
    /// Distinguishes this layer's random draws from those of others.
    pub(crate) layer: u64,
    /// Weight of the adapter for each row `[rows, 1]`; none for 1.
    pub(crate) weights: Option<Tensor<2>>,
}

impl Input {
    /// Creates an input outside of training.
    pub fn new(x: Tensor<2>) -> Self {
        Self { x, pass: Arc::default(), dropout: 0.0, seed: 0, layer: 0, weights: None }
    }

    /// Returns true if dropout is active.
    pub fn drops(&self) -> bool {
        self.dropout > 0.0 && self.pass.training
    }

    /// Returns true if the input of the branch is that of the layer.
    pub(crate) fn is_plain(&self) -> bool {
        !self.drops() && self.weights.is_none()
    }

    /// Returns the input of the branch: weighted row by row, after dropout.
    pub fn branch(&self) -> Tensor<2> {
        let x = match &self.weights {
            Some(weights) => self.x.clone() * weights.clone(),
            None => self.x.clone(),
        };
        self.dropped(self.layer, x)
    }

    /// Applies dropout to values `[rows, n]` inside a branch; `what` distinguishes its positions.
    pub fn inside(&self, what: &str, values: Tensor<2>) -> Tensor<2> {
        self.dropped(self.layer ^ key_of(what), values)
    }

    /// Returns a random number stream for this layer, pass and `what`.
    pub fn random(&self, what: &str) -> StdRng {
        StdRng::seed_from_u64(self.key(self.layer ^ key_of(what)))
    }

    fn key(&self, place: u64) -> u64 {
        self.seed ^ place ^ self.pass.number().wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Applies dropout to `x [rows, n]` with the mask of this layer and pass.
    fn dropped(&self, place: u64, x: Tensor<2>) -> Tensor<2> {
        if !self.drops() {
            return x;
        }
        let shape = x.dims();
        let keep = 1.0 - self.dropout;
        let (limit, scale) = ((keep * 2f64.powi(32)) as u64, (1.0 / keep) as f32);
        let mut state = self.key(place);
        let mut mask = Vec::with_capacity(shape[0] * shape[1] + 1);
        while mask.len() < shape[0] * shape[1] {
            let bits = next(&mut state);
            for half in [bits & 0xffff_ffff, bits >> 32] {
                mask.push(if half < limit { scale } else { 0.0 });
            }
        }
        mask.truncate(shape[0] * shape[1]);
        let plain = x.device().inner();
        x * Tensor::from_data(TensorData::new(mask, shape), (&plain, DType::F32))
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

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;

    #[test]
    fn passes_of_a_run_are_counted_through_its_micro_batches() {
        let pass = |step, micro_batch| PassInfo { micro_batch, micro_batches: 4, ..PassInfo::training(step, None) };
        assert_eq!([pass(0, 0), pass(0, 3), pass(2, 1)].map(|pass| pass.number()), [1, 4, 10]);
        assert_eq!(PassInfo { training: false, ..pass(2, 1) }.number(), 0);
    }

    #[test]
    fn draws_follow_from_seed_layer_name_and_pass() {
        let draw = |seed, layer, what: &str, step| {
            let x = Tensor::zeros([1, 1], &Default::default());
            let input = Input { seed, layer, pass: Arc::new(PassInfo::training(step, None)), ..Input::new(x) };
            input.random(what).random::<u64>()
        };
        assert_eq!(draw(1, 2, "rank", 3), draw(1, 2, "rank", 3));
        for other in [draw(2, 2, "rank", 3), draw(1, 3, "rank", 3), draw(1, 2, "gate", 3), draw(1, 2, "rank", 4)] {
            assert_ne!(other, draw(1, 2, "rank", 3));
        }
    }
}
