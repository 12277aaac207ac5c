//! One training step after another.

use std::time::Instant;

use burn::module::ParamId;
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::Device;
use lowrank_models::adapter::{self, Control, GradientRule, StepOf};
use lowrank_models::{LanguageBatch, Llama, ids_tensor};
use lowrank_optim::OptimError;
use lowrank_optim::rules::GlobalNormClip;

use super::activations::{Activations, Live};
use super::moved::Fingerprints;
use super::segments::{Segment, plus_penalty};
use super::{BackwardMode, Cycle, Schedule, TrainError};
use crate::data::{Batch, Samples};

/// Settings of a [`Trainer`] beyond model, optimizer and data.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerOptions {
    /// Learning rate of each step.
    pub schedule: Schedule,
    /// Micro-batches whose gradients make one step.
    pub accumulation: usize,
    /// Global norm that gradients are scaled down to; none for no clipping.
    pub clip: Option<f64>,
    /// Steps with a non-finite loss or gradient that may be passed over in the whole run.
    pub max_skipped_steps: u64,
    /// Whether attention stays inside a document.
    pub document_mask: bool,
    /// How gradients are computed.
    pub backward: BackwardMode,
    /// Norm that the gradients of each block are scaled down to when blocks are updated one by one; none for no clipping.
    pub block_clip: Option<f64>,
}

/// What one step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The step, counted from 1.
    pub step: u64,
    /// Mean cross-entropy in nats over the tokens of the step.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Most bytes of gradients that existed at a time.
    pub gradient_bytes: u64,
    /// Most bytes that a forward pass left for the backward pass, where the program's allocator or the device tells.
    pub activation_bytes: Option<u64>,
    /// Tokens that counted.
    pub tokens: u64,
    /// Wall time of the step.
    pub seconds: f64,
    /// Those of them that went into reading the samples.
    pub data_seconds: f64,
    /// Whether the update was left out because of a non-finite value.
    pub skipped: bool,
}

/// A model in training: the model, its optimizer and how far they are.
pub struct Trainer {
    // Taken out while the optimizer owns it, so that the update can happen in place.
    model: Option<Llama>,
    optimizer: ModuleOptimizer,
    cycle: Cycle,
    rule: Option<GradientRule>,
    options: TrainerOptions,
    device: Device,
    /// Where the backward pass ends; none when nothing is trained.
    lowest: Option<Segment>,
    /// The handles of the model's adapters.
    controls: Vec<Control>,
    /// Steps taken.
    pub step: u64,
    /// Samples (rows of batches) seen.
    pub samples: u64,
    /// Tokens that counted.
    pub tokens: u64,
    /// Steps passed over because of a non-finite value.
    pub skipped_steps: u64,
    /// What forward passes of the step that is being taken left.
    pub(super) activations: Activations,
}

/// Below this learning rate a step may be smaller than the spacing of f32 around 1, and rightly move nothing.
const SMALLEST_VISIBLE_RATE: f64 = 1e-6;

impl Trainer {
    /// Starts before the first step. The model must be on an autodiff device; what of it is frozen, and its adapters, stay as they are.
    /// The cycle goes with its parameterization.
    pub fn new(model: Llama, optimizer: ModuleOptimizer, cycle: Cycle, options: TrainerOptions) -> Self {
        Self {
            device: model.model.norm.weight.val().device().inner(),
            lowest: Segment::lowest_trained(&model),
            controls: adapter::adapters_of(&model),
            model: Some(model),
            optimizer,
            cycle,
            rule: None,
            options,
            step: 0,
            samples: 0,
            tokens: 0,
            skipped_steps: 0,
            activations: Activations::default(),
        }
    }

    /// With a rule that changes gradients between clipping and the optimizer.
    pub fn with_rule(self, rule: Option<GradientRule>) -> Self {
        Self { rule, ..self }
    }

    /// The rule with its state.
    pub fn rule(&self) -> Option<&GradientRule> {
        self.rule.as_ref()
    }

    /// The lowest segment with a trained tensor.
    pub(super) fn lowest(&self) -> Result<Segment, TrainError> {
        self.lowest.ok_or(TrainError::NothingTrained)
    }

    /// The model as it stands.
    pub fn model(&self) -> &Llama {
        match &self.model {
            Some(model) => model,
            None => unreachable!("the model is back after every step"),
        }
    }

    /// The plain device that the model is on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The optimizer with its state.
    pub fn optimizer(&self) -> &ModuleOptimizer {
        &self.optimizer
    }

    /// Takes one step on the next samples. `observe` sees the gradients before clipping; none when blocks are updated one by one.
    pub fn step(
        &mut self,
        samples: &dyn Samples,
        observe: &mut dyn FnMut(&Llama, &GradientsParams),
    ) -> Result<StepReport, TrainError> {
        let begin = Instant::now();
        let step = self.step + 1;
        let micro: Vec<Batch> = (0..self.options.accumulation as u64)
            .map(|k| samples.at(self.samples + k * samples.batch() as u64))
            .collect::<Result<_, _>>()?;
        let data_seconds = begin.elapsed().as_secs_f64();
        let counted: u64 = micro.iter().map(Batch::counted).sum();
        self.lowest()?;
        if counted == 0 {
            return Err(TrainError::NoTargets { step });
        }
        self.cycle.expect(step);
        self.activations = Activations::default();
        let result = match self.options.backward {
            BackwardMode::PerLayer => self.step_by_block(&micro, counted, observe),
            _ => self.step_at_once(&micro, counted, observe),
        };
        // Whatever reads the model between steps sees no dropout.
        self.set_pass(0);
        let mut report = result?;
        self.finish(step, micro.len() * samples.batch(), counted);
        report.activation_bytes = self.activations.most();
        report.seconds = begin.elapsed().as_secs_f64();
        report.data_seconds = data_seconds;
        Ok(report)
    }

    /// A step in which all gradients exist before the update.
    fn step_at_once(
        &mut self,
        micro: &[Batch],
        counted: u64,
        observe: &mut dyn FnMut(&Llama, &GradientsParams),
    ) -> Result<StepReport, TrainError> {
        let step = self.step + 1;
        let lr = self.options.schedule.rate(step);
        let (nats, grads) = self.gradients(micro, counted)?;
        let resting = self.resting();
        let grads = adapter::drop_resting(self.model(), grads, &resting);
        let loss = nats / counted as f64;
        observe(self.model(), &grads);
        let clipped = match loss.is_finite() {
            true => GlobalNormClip::new(self.options.clip).apply(self.model(), grads).map_err(|source| match source {
                OptimError::NonFiniteGradient { .. } => TrainError::Gradient { step, source },
                other => other.into(),
            }),
            false => Err(TrainError::Loss { step, loss }),
        };
        let mut report = StepReport {
            step,
            loss,
            lr,
            grad_norm: f64::NAN,
            gradient_bytes: 0,
            activation_bytes: None,
            tokens: counted,
            seconds: 0.0,
            data_seconds: 0.0,
            skipped: false,
        };
        match clipped {
            Ok(clipped) => {
                report.grad_norm = clipped.norm;
                report.gradient_bytes = clipped.bytes;
                let mut before = self.checks_moved(lr).then(|| Fingerprints::of(self.model()));
                if let Some(before) = &mut before {
                    before.excuse(self.model(), &clipped.grads, &resting);
                }
                self.update(Segment::Whole, lr, clipped.grads, &resting)?;
                if let Some(before) = before {
                    before.refuse_unmoved(self.model())?;
                }
            }
            Err(TrainError::Loss { .. } | TrainError::Gradient { .. })
                if self.skipped_steps < self.options.max_skipped_steps =>
            {
                self.skipped_steps += 1;
                report.skipped = true;
            }
            Err(error) => return Err(error),
        }
        Ok(report)
    }

    /// Sum of the losses in nats, and the gradient of their mean over all micro-batches: each weighs as many tokens as it has.
    fn gradients(&mut self, micro: &[Batch], counted: u64) -> Result<(f64, GradientsParams), TrainError> {
        let mut accumulator = GradientsAccumulator::new();
        let mut nats = 0.0;
        for (number, batch) in micro.iter().enumerate() {
            let batch = batch_tensors(batch, self.options.document_mask, &self.device);
            let first = number == 0;
            self.set_pass(self.step * micro.len() as u64 + number as u64 + 1);
            if self.options.backward == BackwardMode::Checkpointed {
                nats += self.segments(batch, 1.0 / counted as f64, first, &mut |trainer, _, grads| {
                    accumulator.accumulate(trainer.model(), grads);
                    Ok(())
                })?;
                continue;
            }
            let begin = Live::of(&self.device);
            let model = self.model();
            let LanguageBatch { inputs, targets, starts } = batch;
            let loss = model.loss_sum(inputs, targets, starts);
            self.activations.note(begin.grown(&self.device));
            let model = self.model();
            nats += f64::from(loss.clone().inner().into_scalar::<f32>());
            let mut loss = loss.div_scalar(counted as f64);
            // Once a step: they are no part of the mean over the micro-batches.
            if first {
                loss = plus_penalty(loss, model);
            }
            let grads = GradientsParams::from_grads(loss.backward(), model);
            if micro.len() == 1 {
                return Ok((nats, grads));
            }
            accumulator.accumulate(model, grads);
        }
        Ok((nats, accumulator.grads()))
    }

    /// A step in which each block is updated before the gradients of the one below it exist.
    fn step_by_block(
        &mut self,
        micro: &[Batch],
        counted: u64,
        observe: &mut dyn FnMut(&Llama, &GradientsParams),
    ) -> Result<StepReport, TrainError> {
        let [batch] = micro else {
            return Err(TrainError::Accumulation { count: micro.len() });
        };
        let step = self.step + 1;
        let lr = self.options.schedule.rate(step);
        observe(self.model(), &GradientsParams::new());
        self.set_pass(step);
        let tensors = batch_tensors(batch, self.options.document_mask, &self.device);
        let resting = self.resting();
        let mut fingerprints = self.checks_moved(lr).then(|| Fingerprints::of(self.model()));
        let (mut squares, mut most) = (0.0, 0);
        let rule = GlobalNormClip::new(self.options.block_clip);
        let nats = self.segments(tensors, 1.0 / counted as f64, true, &mut |trainer, segment, grads| {
            let grads = adapter::drop_resting(trainer.model(), grads, &resting);
            if let Some(fingerprints) = &mut fingerprints {
                fingerprints.excuse(trainer.model(), &grads, &resting);
            }
            let clipped = rule.apply(trainer.model(), grads).map_err(|source| match source {
                OptimError::NonFiniteGradient { .. } => TrainError::BlockGradient { step, source },
                other => other.into(),
            })?;
            squares += clipped.norm * clipped.norm;
            most = most.max(clipped.bytes);
            trainer.update(segment, lr, clipped.grads, &resting)
        })?;
        let loss = nats / counted as f64;
        if !loss.is_finite() {
            return Err(TrainError::Loss { step, loss });
        }
        if let Some(fingerprints) = fingerprints {
            fingerprints.refuse_unmoved(self.model())?;
        }
        Ok(StepReport {
            step,
            loss,
            lr,
            grad_norm: f64::sqrt(squares),
            gradient_bytes: most,
            activation_bytes: None,
            tokens: counted,
            seconds: 0.0,
            data_seconds: 0.0,
            skipped: false,
        })
    }

    /// What follows the update of a step, or its leaving out.
    fn finish(&mut self, step: u64, samples: usize, tokens: u64) {
        if let Some(model) = self.model.take() {
            self.model = Some(self.cycle.follow(step, model, &mut self.optimizer));
        }
        self.step = step;
        self.samples += samples as u64;
        self.tokens += tokens;
    }

    /// Whether this update is the first that must move every tensor: the first of all, or the first after a rate of 0.
    fn checks_moved(&self, lr: f64) -> bool {
        let first = self.step == self.skipped_steps || self.options.schedule.rate(self.step) < SMALLEST_VISIBLE_RATE;
        first && lr >= SMALLEST_VISIBLE_RATE
    }

    /// Trained tensors that rest in the step that is being taken.
    fn resting(&self) -> Vec<ParamId> {
        adapter::resting(self.model(), StepOf { step: self.step, total: self.options.schedule.total_steps })
    }

    fn set_pass(&self, pass: u64) {
        self.controls.iter().for_each(|control| control.set_pass(pass));
    }

    fn update(
        &mut self,
        segment: Segment,
        lr: f64,
        grads: GradientsParams,
        resting: &[ParamId],
    ) -> Result<(), TrainError> {
        let grads = match &self.rule {
            Some(rule) => rule.apply(self.model(), grads)?,
            None => grads,
        };
        let grads = segment.after_clipping(self.model(), grads, self.options.schedule.peak, resting)?;
        if let Some(model) = self.model.take() {
            let model = self.model.insert(self.optimizer.step(lr, model, grads));
            self.cycle.complete(model)?;
        }
        Ok(())
    }
}

/// A batch as tensors; without `document_mask` attention sees the whole row.
pub fn batch_tensors(batch: &Batch, document_mask: bool, device: &Device) -> LanguageBatch {
    let tensor = |values: &[i32]| ids_tensor(values, batch.batch, device);
    // A row that is one document needs no mask.
    let masked = document_mask && batch.starts.iter().any(|start| *start != 0);
    LanguageBatch {
        inputs: tensor(&batch.inputs),
        targets: tensor(&batch.targets),
        starts: masked.then(|| tensor(&batch.starts)),
    }
}
