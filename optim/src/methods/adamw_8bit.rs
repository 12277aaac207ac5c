//! AdamW with moments of one byte.

use burn::config::Config;
use burn::optim::{ModuleOptimizer, Optimizer, RecordState};
use burn::tensor::{Device, Tensor, f16};
use lowrank_kernels::elementwise;
use lowrank_kernels::host::{Memory, values};
use lowrank_kernels::narrow::blocks::DynamicMap;
use lowrank_kernels::narrow::companded::{Companding, GROUP};
use lowrank_kernels::vectorised::vectorised;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adam::{AdamOptions, adam_builders};
use crate::change::WeightChange;
use crate::error::OptimError;
use crate::matrix_id::MatrixId;
use crate::method::MethodConfig;
use crate::methods::adamw::{AdamW, AdamWConfig, AdamWState};
use crate::precision::in_f32;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::registry::options;
use crate::state::moments::{Moment, MomentType, QuantisedMoment, Storage, companding, map};
use crate::state::reset::{ResetMoments, changed};

/// Codes of 8-bit moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MomentCodes {
    /// The dynamic map, with a scale of 4 bytes for each block.
    Dynamic,
    /// Companded: finer near the largest value, with a scale of 2 bytes for each 32 values.
    Companded,
}

/// Configuration of [`AdamW8bit`].
#[derive(Config, Debug, JsonSchema)]
pub struct AdamW8bitConfig {
    /// Codes of the moments.
    #[config(default = "MomentCodes::Dynamic")]
    pub codes: MomentCodes,
    /// Elements that share a scale; companded codes have groups of 32 instead.
    #[config(default = 256)]
    #[schemars(extend("enum" = [64, 128, 256, 512, 1024, 2048, 4096]))]
    pub block: usize,
    /// Smallest tensor with 8-bit moments, in elements; smaller ones keep f32 moments.
    #[config(default = 4096)]
    pub min_8bit_size: usize,
    /// Keep a positive second moment from becoming 0, which it does below 1.6e-7 of its block's largest.
    #[config(default = false)]
    pub keep_v_positive: bool,
    /// Decay weights before the update rather than after.
    #[config(default = false)]
    pub decay_before: bool,
    /// Learning rate of hidden matrices as a multiple of that of all other parameters.
    #[config(default = 1.0)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub lr_scale: f64,
    /// Options of Adam.
    #[config(default = "AdamOptions::new()")]
    pub adam: AdamOptions,
}

/// AdamW with block-wise 8-bit moments: "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., arXiv 2110.02861).
///
/// Companded codes are those of "FlashOptim: Optimizers for Memory Efficient Training" (Gonzalez Ortiz et al., arXiv 2602.23349).
///
/// A step decodes a block, moves its weights with the exact new moments and encodes these again: no copy of the moments in f32 exists. Embeddings
/// should keep 32-bit moments: where a row has no gradient, a second moment that became 0 would make its next step a leap.
#[derive(Clone, Debug)]
pub struct AdamW8bit {
    plain: AdamW,
    config: AdamW8bitConfig,
}

/// State of [`AdamW8bit`] for one parameter.
#[derive(Clone, Debug, RecordState)]
pub struct AdamW8bitState<const D: usize> {
    /// State of a tensor that keeps f32 moments.
    pub plain: Option<AdamWState<D>>,
    /// Steps taken, for a tensor with 8-bit moments.
    pub time: usize,
    /// Moving average of the gradient.
    pub moment_1: Option<Moment<D>>,
    /// Moving average of its square.
    pub moment_2: Option<Moment<D>>,
}

adam_builders!(AdamW8bitConfig);

impl AdamW8bitConfig {
    /// Rejects values outside what the options allow.
    pub fn validate(&self) -> Result<(), OptimError> {
        Ok(options::validate(self)?)
    }

    /// The bare optimizer, for [`ModuleOptimizer::with_group`].
    ///
    /// # Panics
    ///
    /// When [`AdamW8bitConfig::validate`] rejects the configuration.
    pub fn build(&self) -> AdamW8bit {
        match self.optimizer() {
            Ok(optimizer) => optimizer,
            Err(error) => panic!("{error}"),
        }
    }

    /// The optimizer of a whole module.
    ///
    /// # Panics
    ///
    /// When [`AdamW8bitConfig::validate`] rejects the configuration.
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.build())
    }

    fn storage(&self) -> Storage {
        let (kind, block) = match self.codes {
            MomentCodes::Dynamic => (MomentType::EightBit, self.block),
            MomentCodes::Companded => (MomentType::Companded, GROUP),
        };
        Storage { kind, block, min_size: self.min_8bit_size, keep_positive: self.keep_v_positive }
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = Method {
    saves_state_of: Some("adamw"),
    ..method!(
        resettable AdamW8bitConfig,
        AdamW8bitConfig::new().with_beta_2(0.95),
        Entry {
            papers: &[Paper { title: "8-bit Optimizers via Block-wise Quantization", place: "2110.02861" }],
            memory: "2 RC bytes + 8 bytes a block, or 4 bytes for 32 companded values",
            ..Entry::plain(Kind::Optimizer, "adamw-8bit", "AdamW with 8-bit moments in blocks; embedding and head keep f32 moments")
        }
    )
};

impl MethodConfig for AdamW8bitConfig {
    type Optimizer = AdamW8bit;

    const NEEDS_MATRICES: bool = false;

    fn optimizer(&self) -> Result<AdamW8bit, OptimError> {
        self.validate()?;
        let plain = self.others().with_lr_scale(self.lr_scale).build();
        Ok(AdamW8bit { plain, config: self.clone() })
    }

    fn at(optimizer: AdamW8bit, _place: MatrixId) -> AdamW8bit {
        optimizer
    }

    fn takes(&self, _shape: [usize; 2]) -> bool {
        true
    }

    fn others(&self) -> AdamWConfig {
        AdamWConfig::new().with_adam(self.adam).with_decay_after(!self.decay_before)
    }

    fn state_bytes(&self, [rows, columns]: [usize; 2]) -> usize {
        2 * self.storage().bytes(rows * columns)
    }
}

impl WeightChange for AdamW8bit {
    fn change<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<AdamW8bitState<D>>,
    ) -> (Tensor<D>, Option<AdamW8bitState<D>>) {
        let decay = lr * self.config.lr_scale * self.config.adam.weight_decay;
        let (moved, state) = self.step(lr, tensor.zeros_like(), grad, state);
        (moved - tensor.mul_scalar(decay), state)
    }
}

impl Optimizer for AdamW8bit {
    type State<const D: usize> = AdamW8bitState<D>;

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<AdamW8bitState<D>>,
    ) -> (Tensor<D>, Option<AdamW8bitState<D>>) {
        let count = tensor.shape().num_elements();
        if !self.config.storage().as_blocks(count) {
            let (tensor, plain) = self.plain.step(lr, tensor, grad, state.and_then(|state| state.plain));
            return (tensor, Some(AdamW8bitState { plain, time: 0, moment_1: None, moment_2: None }));
        }
        let (device, shape) = (tensor.device(), tensor.dims());
        let (time, moments) = match state {
            Some(state) => (state.time, state.moment_1.zip(state.moment_2)),
            None => (0, None),
        };
        let storage = self.config.storage();
        let fresh = |signed: bool| Coded {
            codes: vec![if storage.kind == MomentType::Companded { 0 } else { map(signed).nearest(0.0) }; count],
            largest: vec![0.0; count.div_ceil(storage.block)],
        };
        let (mut m, mut v) = match moments {
            Some((m, v)) => (Coded::of(m), Coded::of(v)),
            None => (fresh(true), fresh(false)),
        };
        let step = self.plain.config().at(lr, time + 1);
        let (tensor, ()) = in_f32(tensor, grad, |tensor, grad| {
            let (mut w, g) = (Memory::of(tensor), Memory::of(grad));
            update(w.write(), g.read(), &mut m, &mut v, storage, step);
            (w.tensor(), ())
        });
        let kept = |coded: Coded, signed| {
            let Coded { codes, largest } = coded;
            Some(Moment::from_blocks(QuantisedMoment::from_parts(
                codes,
                largest,
                shape.to_vec(),
                signed,
                storage,
                &device,
            )))
        };
        let state = AdamW8bitState { plain: None, time: time + 1, moment_1: kept(m, true), moment_2: kept(v, false) };
        (tensor, Some(state))
    }

    fn to_device<const D: usize>(state: AdamW8bitState<D>, device: &Device) -> AdamW8bitState<D> {
        AdamW8bitState {
            plain: state.plain.map(|plain| AdamW::to_device(plain, device)),
            time: state.time,
            moment_1: state.moment_1.map(|moment| moment.to_device(device)),
            moment_2: state.moment_2.map(|moment| moment.to_device(device)),
        }
    }
}

impl ResetMoments for AdamW8bit {
    fn reset<const D: usize>(&self, state: AdamW8bitState<D>, change: &mut dyn FnMut(&mut [f32])) -> AdamW8bitState<D> {
        let storage = self.config.storage();
        let mut moment = |moment: Moment<D>, signed| storage.keep(changed(moment.restored(), change), signed);
        let moment_1 = state.moment_1.map(|kept| moment(kept, true));
        let moment_2 = state.moment_2.map(|kept| moment(kept, false));
        AdamW8bitState { plain: state.plain.map(|plain| self.plain.reset(plain, change)), moment_1, moment_2, ..state }
    }
}

/// A moment on the host.
struct Coded {
    codes: Vec<u8>,
    largest: Vec<f32>,
}

impl Coded {
    fn of<const D: usize>(moment: Moment<D>) -> Self {
        match moment.into_blocks() {
            Some(blocks) => {
                let codes = match blocks.codes.into_data().try_into_vec::<u8>() {
                    Ok(codes) => codes,
                    Err(error) => unreachable!("codes are bytes: {error:?}"),
                };
                Self { codes, largest: values(blocks.largest) }
            }
            None => unreachable!("a tensor of this size is stored as blocks"),
        }
    }
}

/// Reads and writes the codes of a block.
#[derive(Clone, Copy)]
enum Coder {
    Dynamic { map: &'static DynamicMap, keep_positive: bool },
    Companded(Companding),
}

impl Coder {
    fn of(storage: Storage, signed: bool) -> Self {
        match storage.kind {
            MomentType::Companded => Self::Companded(companding(signed)),
            _ => Self::Dynamic { map: map(signed), keep_positive: storage.keep_positive && !signed },
        }
    }

    #[inline]
    fn decode(self, codes: &[u8], largest: f32, values: &mut [f32]) {
        match self {
            Self::Dynamic { map, .. } => map.decode(codes, largest, values),
            Self::Companded(kind) => vectorised(
                #[inline(always)]
                || kind.decode(codes, f16::from_f32(largest), values),
            ),
        }
    }

    #[inline]
    fn encode(self, values: &mut [f32], codes: &mut [u8]) -> f32 {
        match self {
            Self::Dynamic { map, keep_positive } => map.encode(values, codes, keep_positive),
            Self::Companded(kind) => vectorised(
                #[inline(always)]
                || kind.encode(values, codes).to_f32(),
            ),
        }
    }
}

fn update(w: &mut [f32], g: &[f32], m: &mut Coded, v: &mut Coded, storage: Storage, f: elementwise::AdamW) {
    let (block, first, second) = (storage.block, Coder::of(storage, true), Coder::of(storage, false));
    let moments = |coded: &mut Coded| std::mem::take(&mut coded.codes);
    let (mut m_codes, mut v_codes) = (moments(m), moments(v));
    let tensors = w.par_chunks_mut(block).zip(g.par_chunks(block));
    let codes = m_codes.par_chunks_mut(block).zip(v_codes.par_chunks_mut(block));
    let largest = m.largest.par_iter_mut().zip(&mut v.largest);
    tensors.zip(codes).zip(largest).with_min_len(4096 / block).for_each_init(
        || vec![0f32; 2 * block],
        |memory, (((w, g), (m_codes, v_codes)), (m_largest, v_largest))| {
            let (m, v) = memory.split_at_mut(block);
            let (m, v) = (&mut m[..w.len()], &mut v[..w.len()]);
            first.decode(m_codes, *m_largest, m);
            second.decode(v_codes, *v_largest, v);
            vectorised(
                #[inline(always)]
                || f.step(w, g, m, v),
            );
            *m_largest = first.encode(m, m_codes);
            *v_largest = second.encode(v, v_codes);
        },
    );
    (m.codes, v.codes) = (m_codes, v_codes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    fn matrix(rows: usize, seed: f32) -> Tensor<2> {
        let values: Vec<f32> = (0..rows * 64).map(|i| (i as f32 * 0.731 + seed).sin()).collect();
        Tensor::from_data(TensorData::new(values, [rows, 64]), &Device::default())
    }

    #[test]
    fn the_first_step_is_that_of_adamw_and_small_tensors_follow_it_exactly() {
        let ours = AdamW8bitConfig::new().with_weight_decay(0.1).build();
        let plain = AdamWConfig::new().with_weight_decay(0.1).with_decay_after(true).build();
        let (a, _) = ours.step(0.01, matrix(100, 0.0), matrix(100, 1.0), None);
        let (b, _) = plain.step(0.01, matrix(100, 0.0), matrix(100, 1.0), None);
        assert!(values(a).iter().zip(values(b)).all(|(a, b)| (a - b).abs() <= 1e-6));
        let (mut a, mut b) = (matrix(63, 0.0), matrix(63, 0.0));
        let (mut state_a, mut state_b) = (None, None);
        for step in 0..5 {
            (a, state_a) = ours.step(0.01, a, matrix(63, step as f32), state_a);
            (b, state_b) = plain.step(0.01, b, matrix(63, step as f32), state_b);
        }
        assert_eq!(values(a), values(b));
    }

    #[test]
    fn a_huge_gradient_changes_its_own_block_alone() {
        let ours = AdamW8bitConfig::new().build();
        let codes = |g: Tensor<2>| {
            let (_, state) = ours.step(0.01, matrix(100, 0.0), g, None);
            Coded::of(state.unwrap().moment_2.unwrap()).codes
        };
        let mut spoiled = values(matrix(100, 1.0));
        spoiled[300] = 1e6;
        let spoiled = Tensor::from_data(TensorData::new(spoiled, [100, 64]), &Device::default());
        let (a, b) = (codes(matrix(100, 1.0)), codes(spoiled));
        assert!(a[..256] == b[..256] && a[512..] == b[512..] && a[256..512] != b[256..512]);
    }

    #[test]
    fn least_squares_end_near_those_of_adamw() {
        // 400 examples of 300 features, eight targets: 2400 weights, all in 8 bits.
        use lowrank_kernels::random::normal_matrix;

        let device = Device::default();
        let x = normal_matrix(1, 1, [400, 300], &device);
        let y = x.clone().matmul(normal_matrix(1, 2, [300, 8], &device)) + normal_matrix(1, 3, [400, 8], &device) * 0.1;
        let run = |eight: bool, steps: usize| {
            let ours = AdamW8bitConfig::new().with_min_8bit_size(0).build();
            let plain = AdamWConfig::new().build();
            let mut w = Tensor::<2>::zeros([300, 8], &device);
            let (mut a, mut b) = (None, None);
            for _ in 0..steps {
                let g = x.clone().transpose().matmul(x.clone().matmul(w.clone()) - y.clone()) / 400.0;
                match eight {
                    true => (w, a) = ours.step(0.02, w, g, a),
                    false => (w, b) = plain.step(0.02, w, g, b),
                }
            }
            (x.clone().matmul(w) - y.clone()).square().mean().into_scalar::<f32>()
        };
        for (steps, bound) in [(100, 1.05), (200, 1.25)] {
            let (eight, plain) = (run(true, steps), run(false, steps));
            assert!(eight <= plain * bound, "{steps}: {eight} {plain}");
        }
    }
}
