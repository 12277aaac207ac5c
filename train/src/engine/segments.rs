//! Engine side of the block-by-block backward pass.

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Tensor};
use lowrank_models::{Segment, SegmentedModel, WalkPoint, Walker};
use lowrank_optim::GlobalNormClip;
use lowrank_optim::{Hooks, OptimError, StepInfo};

use super::TrainError;
use super::activations::{Activations, Live};
use super::moved::Fingerprints;
use super::sums::sum_gradients;
use super::updates::Updates;
use crate::process::Peers;

/// Memory kept by the forward passes of a walk, measured during the walk.
pub(super) struct Measured {
    device: Device,
    start: Live,
    inputs: Option<u64>,
    block: Live,
    pub activations: Activations,
}

impl Measured {
    pub fn new(device: &Device) -> Self {
        let now = Live::of(device);
        Self { device: device.clone(), start: now, inputs: None, block: now, activations: Activations::default() }
    }

    fn at(&mut self, point: WalkPoint) {
        match point {
            WalkPoint::Start => self.start = Live::of(&self.device),
            WalkPoint::InputsKept => self.inputs = self.start.grown(&self.device),
            WalkPoint::HeadForward => self.activations.note(self.start.grown(&self.device)),
            WalkPoint::BlockStart => self.block = Live::of(&self.device),
            WalkPoint::BlockForward => {
                let block = self.block.grown(&self.device);
                self.activations.note(self.inputs.zip(block).map(|(kept, block)| kept + block));
            }
        }
    }
}

/// Gathers the gradients of all segments.
pub(super) struct Gather<'a, M: SegmentedModel> {
    pub model: &'a M,
    pub hooks: &'a Hooks<M>,
    pub step: &'a StepInfo,
    /// True if terms of hooks belong to this micro-batch: they are added once per step.
    pub first: bool,
    pub accumulator: &'a mut GradientsAccumulator<M>,
    pub measured: Measured,
}

impl<M: SegmentedModel> Walker<M> for Gather<'_, M> {
    type Error = TrainError;

    fn model(&self) -> &M {
        self.model
    }

    fn loss_term(&self, segment: Segment) -> Result<Option<Tensor<1>>, TrainError> {
        if !self.first {
            return Ok(None);
        }
        self.hooks.loss_term(self.step, &segment.of(self.model)).map_err(TrainError::hook)
    }

    fn measure(&mut self, point: WalkPoint) {
        self.measured.at(point);
    }

    fn gradients(&mut self, _: Segment, grads: GradientsParams) -> Result<(), TrainError> {
        self.accumulator.accumulate(self.model, grads);
        Ok(())
    }
}

/// Updates each segment as soon as its gradients are available.
pub(super) struct Update<'a, M: SegmentedModel> {
    pub updates: &'a mut Updates<M>,
    pub step: &'a StepInfo,
    pub clip: GlobalNormClip,
    pub fingerprints: Option<Fingerprints>,
    /// Sum of the squared norms of the segments' gradients.
    pub squares: f64,
    /// Maximum bytes of gradients at a time.
    pub most: u64,
    /// Processes whose gradients are summed.
    pub peers: Peers,
    pub measured: Measured,
}

impl<M: SegmentedModel> Walker<M> for Update<'_, M> {
    type Error = TrainError;

    fn model(&self) -> &M {
        self.updates.model()
    }

    fn loss_term(&self, segment: Segment) -> Result<Option<Tensor<1>>, TrainError> {
        if !self.peers.is_first() {
            return Ok(None);
        }
        self.updates.hooks.loss_term(self.step, &segment.of(self.updates.model())).map_err(TrainError::hook)
    }

    fn measure(&mut self, point: WalkPoint) {
        self.measured.at(point);
    }

    fn gradients(&mut self, segment: Segment, grads: GradientsParams) -> Result<(), TrainError> {
        let grads = sum_gradients(self.peers, self.updates.model(), grads)?;
        let grads = self.updates.before_clipping(self.step, Some(segment), grads)?;
        if let Some(fingerprints) = &mut self.fingerprints {
            fingerprints.excuse(self.updates.model(), &grads, &self.updates.hooks.frozen());
        }
        let clipped = self.clip.apply(self.updates.model(), grads).map_err(|source| match source {
            OptimError::NonFiniteGradient { .. } => TrainError::BlockGradient { step: self.step.step, source },
            other => other.into(),
        })?;
        self.squares += clipped.norm * clipped.norm;
        self.most = self.most.max(clipped.bytes);
        self.updates.update(self.step, Some(segment), clipped.grads)
    }
}
