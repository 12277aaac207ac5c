//! One training step after another.

use std::time::Instant;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::Device;
use lowrank_models::adapter::{self, AdapterSteps, Control};
use lowrank_models::{Segment, SegmentedModel, Walker};
use lowrank_optim::{GlobalNormClip, Hooks, OptimError, Part, StepInfo};

use super::activations::{Activations, Live};
use super::micro::MicroBatch;
use super::moved::Fingerprints;
use super::segments::{Gather, Measured, Update};
use super::{BackwardMode, Schedule, TrainError};
use crate::objective::{Objective, Streams};

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
    /// Weighted sum of the terms of the objective: of a language model with one term the mean cross-entropy in nats over the tokens of the step.
    pub loss: f64,
    /// Mean loss of each term.
    pub terms: Vec<f64>,
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
pub struct Trainer<M: SegmentedModel> {
    // Taken out while the optimizer owns it, so that the update can happen in place.
    model: Option<M>,
    optimizer: ModuleOptimizer,
    pub(super) hooks: Hooks<M>,
    objective: Objective<M>,
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
    activations: Activations,
}

/// Below this learning rate a step may be smaller than the spacing of f32 around 1, and rightly move nothing.
const SMALLEST_VISIBLE_RATE: f64 = 1e-6;

impl<M: SegmentedModel> Trainer<M> {
    /// Starts before the first step, with the model's own loss as objective. The model must be on an autodiff device; what of it is frozen, and
    /// its adapters, stay as they are. Penalties of adapters are among the hooks already, after those that are given.
    pub fn new(model: M, optimizer: ModuleOptimizer, hooks: Hooks<M>, options: TrainerOptions) -> Self {
        Self {
            device: plain_device(&model),
            lowest: Segment::lowest_trained(&model),
            controls: adapter::adapters_of(&model),
            model: Some(model),
            optimizer,
            hooks: hooks.with(AdapterSteps::default()),
            objective: Objective::default(),
            options,
            step: 0,
            samples: 0,
            tokens: 0,
            skipped_steps: 0,
            activations: Activations::default(),
        }
    }

    /// With another objective.
    pub fn with_objective(self, objective: Objective<M>) -> Self {
        Self { objective, ..self }
    }

    /// The hooks with their states.
    pub fn hooks(&self) -> &Hooks<M> {
        &self.hooks
    }

    /// As [`Trainer::hooks`], to be changed.
    pub fn hooks_mut(&mut self) -> &mut Hooks<M> {
        &mut self.hooks
    }

    /// The lowest segment with a trained tensor.
    fn lowest(&self) -> Result<Segment, TrainError> {
        self.lowest.ok_or(TrainError::NothingTrained)
    }

    /// The model as it stands.
    pub fn model(&self) -> &M {
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

    /// As [`Trainer::optimizer`], to be changed.
    pub fn optimizer_mut(&mut self) -> &mut ModuleOptimizer {
        &mut self.optimizer
    }

    /// Takes one step on the next samples. `observe` sees the gradients before clipping; none when blocks are updated one by one.
    pub fn step(
        &mut self,
        streams: &Streams<'_, M::Batch>,
        observe: &mut dyn FnMut(&M, &GradientsParams),
    ) -> Result<StepReport, TrainError> {
        let begin = Instant::now();
        let step = self.step_info();
        let first = streams.get(&self.objective.terms()[0].stream)?.batch() as u64;
        let micro = (0..self.options.accumulation as u64)
            .map(|number| MicroBatch::read(&self.objective, streams, [self.samples, first, number], &self.device))
            .collect::<Result<Vec<_>, TrainError>>()?;
        let data_seconds = begin.elapsed().as_secs_f64();
        let counted = self.counted(&micro)?;
        self.lowest()?;
        let objective = self.objective.clone();
        let means = Means { objective: &objective, counted: &counted };
        if let Some(model) = &self.model {
            self.hooks.begin_step(&step, model).map_err(TrainError::hook)?;
        }
        self.activations = Activations::default();
        let result = match self.options.backward {
            BackwardMode::PerLayer => self.step_by_block(&step, &micro, &means, observe),
            _ => self.step_at_once(&step, &micro, &means, observe),
        };
        // Whatever reads the model between steps sees no dropout.
        self.set_pass(0);
        let mut report = result?;
        self.finish(&step, micro.len() as u64 * first, report.tokens);
        report.activation_bytes = self.activations.most();
        report.seconds = begin.elapsed().as_secs_f64();
        report.data_seconds = data_seconds;
        Ok(report)
    }

    /// Position and learning rate of the step that comes.
    fn step_info(&self) -> StepInfo {
        let schedule = &self.options.schedule;
        let step = self.step + 1;
        StepInfo { step, total: schedule.total_steps, lr: schedule.rate(step), peak_lr: schedule.peak }
    }

    /// Losses that count of each term, over all micro-batches.
    fn counted(&self, micro: &[MicroBatch<M>]) -> Result<Vec<u64>, TrainError> {
        let sums = (0..self.objective.terms().len()).map(|term| micro.iter().map(|micro| micro.counted[term]).sum());
        let sums: Vec<u64> = sums.collect();
        match sums.iter().position(|sum| *sum == 0) {
            None => Ok(sums),
            Some(term) => {
                Err(TrainError::NoTargets { step: self.step + 1, stream: self.objective.terms()[term].stream.clone() })
            }
        }
    }

    /// A step in which all gradients exist before the update.
    fn step_at_once(
        &mut self,
        step: &StepInfo,
        micro: &[MicroBatch<M>],
        means: &Means<'_, M>,
        observe: &mut dyn FnMut(&M, &GradientsParams),
    ) -> Result<StepReport, TrainError> {
        let (sums, grads) = self.gradients(step, micro, means)?;
        let grads = self.before_clipping(step, None, grads)?;
        let mut report = means.report(step, &sums);
        observe(self.model(), &grads);
        let clipped = match report.loss.is_finite() {
            true => GlobalNormClip::new(self.options.clip).apply(self.model(), grads).map_err(|source| match source {
                OptimError::NonFiniteGradient { .. } => TrainError::Gradient { step: step.step, source },
                other => other.into(),
            }),
            false => Err(TrainError::Loss { step: step.step, loss: report.loss }),
        };
        match clipped {
            Ok(clipped) => {
                report.grad_norm = clipped.norm;
                report.gradient_bytes = clipped.bytes;
                let mut before = self.checks_moved(step.lr).then(|| Fingerprints::of(self.model()));
                if let Some(before) = &mut before {
                    before.excuse(self.model(), &clipped.grads, &self.hooks.frozen());
                }
                self.update(step, None, clipped.grads)?;
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

    /// Sum of the losses of each term, and the gradient of the weighted sum of their means over all micro-batches: each micro-batch weighs as much
    /// as counts in it.
    fn gradients(
        &mut self,
        step: &StepInfo,
        micro: &[MicroBatch<M>],
        means: &Means<'_, M>,
    ) -> Result<(Vec<f64>, GradientsParams), TrainError> {
        let mut accumulator = GradientsAccumulator::new();
        let mut sums = vec![0.0; means.counted.len()];
        for (number, batches) in micro.iter().enumerate() {
            let first = number == 0;
            self.set_pass(self.step * micro.len() as u64 + number as u64 + 1);
            if self.options.backward == BackwardMode::Checkpointed {
                let mut gather = Gather {
                    model: self.model(),
                    hooks: &self.hooks,
                    step,
                    first,
                    accumulator: &mut accumulator,
                    measured: Measured::new(&self.device),
                };
                let found = means.walk(batches, self.lowest()?, &mut gather)?;
                let measured = gather.measured.activations;
                self.activations.note(measured.most());
                sums.iter_mut().zip(found).for_each(|(sum, found)| *sum += found);
                continue;
            }
            let begin = Live::of(&self.device);
            let model = self.model();
            let losses = batches.losses(means.objective, model);
            self.activations.note(begin.grown(&self.device));
            let model = self.model();
            for (sum, loss) in sums.iter_mut().zip(&losses) {
                *sum += f64::from(loss.clone().inner().into_scalar::<f32>());
            }
            let means = losses.into_iter().zip(means.divisors()).map(|(loss, divisor)| loss.div_scalar(divisor));
            let mut loss = match means.reduce(|sum, loss| sum + loss) {
                Some(loss) => loss,
                None => unreachable!("an objective has at least one term"),
            };
            // Once a step: they are no part of the mean over the micro-batches.
            if first && let Some(term) = self.hooks.loss_term(step, model).map_err(TrainError::hook)? {
                loss = loss + term;
            }
            let grads = GradientsParams::from_grads(loss.backward(), model);
            if micro.len() == 1 {
                return Ok((sums, grads));
            }
            accumulator.accumulate(model, grads);
        }
        Ok((sums, accumulator.grads()))
    }

    /// A step in which each block is updated before the gradients of the one below it exist.
    fn step_by_block(
        &mut self,
        step: &StepInfo,
        micro: &[MicroBatch<M>],
        means: &Means<'_, M>,
        observe: &mut dyn FnMut(&M, &GradientsParams),
    ) -> Result<StepReport, TrainError> {
        let [batches] = micro else {
            return Err(TrainError::Accumulation { count: micro.len() });
        };
        if let Some((hook, reason)) = self.hooks.needs_all_gradients() {
            return Err(TrainError::AllGradients { hook, reason });
        }
        observe(self.model(), &GradientsParams::new());
        self.set_pass(step.step);
        let lowest = self.lowest()?;
        let mut update = Update {
            step,
            clip: GlobalNormClip::new(self.options.block_clip),
            fingerprints: self.checks_moved(step.lr).then(|| Fingerprints::of(self.model())),
            squares: 0.0,
            most: 0,
            measured: Measured::new(&self.device),
            trainer: self,
        };
        let sums = means.walk(batches, lowest, &mut update)?;
        let Update { fingerprints, squares, most, measured, .. } = update;
        self.activations = measured.activations;
        let mut report = means.report(step, &sums);
        if !report.loss.is_finite() {
            return Err(TrainError::Loss { step: step.step, loss: report.loss });
        }
        if let Some(fingerprints) = fingerprints {
            fingerprints.refuse_unmoved(self.model())?;
        }
        report.grad_norm = f64::sqrt(squares);
        report.gradient_bytes = most;
        Ok(report)
    }

    /// What follows the update of a step, or its leaving out.
    fn finish(&mut self, step: &StepInfo, samples: u64, tokens: u64) {
        if let Some(model) = self.model.take() {
            self.model = Some(self.hooks.end_step(step, model, &mut self.optimizer));
        }
        self.step = step.step;
        self.samples += samples;
        self.tokens += tokens;
    }

    /// Whether this update is the first that must move every tensor: the first of all, or the first after a rate of 0.
    fn checks_moved(&self, lr: f64) -> bool {
        let first = self.step == self.skipped_steps || self.options.schedule.rate(self.step) < SMALLEST_VISIBLE_RATE;
        first && lr >= SMALLEST_VISIBLE_RATE
    }

    fn set_pass(&self, pass: u64) {
        self.controls.iter().for_each(|control| control.set_pass(pass));
    }

    /// Gradients of a segment, or of the whole model, as they are clipped.
    pub(super) fn before_clipping(
        &mut self,
        step: &StepInfo,
        segment: Option<Segment>,
        grads: GradientsParams,
    ) -> Result<GradientsParams, TrainError> {
        let Some(model) = &self.model else { return Ok(grads) };
        with_part(model, segment, |part| self.hooks.before_clipping(step, part, grads)).map_err(TrainError::hook)
    }

    /// Updates the model with the clipped gradients of a segment, or of all of it.
    pub(super) fn update(
        &mut self,
        step: &StepInfo,
        segment: Option<Segment>,
        grads: GradientsParams,
    ) -> Result<(), TrainError> {
        let Some(model) = &self.model else { return Ok(()) };
        let grads = with_part(model, segment, |part| self.hooks.after_clipping(step, part, grads));
        let grads = grads.map_err(TrainError::hook)?;
        if let Some(model) = self.model.take() {
            let model = self.hooks.before_update(step, model);
            let model = self.model.insert(self.optimizer.step(step.lr, model, grads));
            self.hooks.after_update(step, model).map_err(TrainError::hook)?;
        }
        Ok(())
    }
}

/// A segment of a model, or all of it.
fn with_part<M: SegmentedModel, R>(model: &M, segment: Option<Segment>, work: impl FnOnce(&dyn Part) -> R) -> R {
    match segment {
        Some(segment) => work(&segment.of(model)),
        None => work(model),
    }
}

/// The plain device that a model is on.
pub(super) fn plain_device<M: Module>(model: &M) -> Device {
    model.devices().into_iter().next().map_or_else(Device::default, Device::inner)
}

/// The objective of a step, and the number of losses of each term.
struct Means<'a, M: SegmentedModel> {
    objective: &'a Objective<M>,
    counted: &'a [u64],
}

impl<M: SegmentedModel> Means<'_, M> {
    /// The divisor of each term's sum.
    fn divisors(&self) -> impl Iterator<Item = f64> {
        self.objective.terms().iter().zip(self.counted).map(|(term, counted)| *counted as f64 / term.weight)
    }

    /// The backward pass of a micro-batch block by block, and the sum of the losses of each term.
    fn walk<W: Walker<M>>(
        &self,
        batches: &MicroBatch<M>,
        lowest: Segment,
        walker: &mut W,
    ) -> Result<Vec<f64>, W::Error> {
        let factors = self
            .objective
            .terms()
            .iter()
            .zip(self.counted)
            .map(|(term, counted)| term.weight * (1.0 / *counted as f64));
        batches.walk(self.objective, &factors.collect::<Vec<_>>(), lowest, walker)
    }

    /// A report of the losses alone.
    fn report(&self, step: &StepInfo, sums: &[f64]) -> StepReport {
        let terms: Vec<f64> = sums.iter().zip(self.counted).map(|(sum, counted)| sum / *counted as f64).collect();
        StepReport {
            step: step.step,
            loss: self.objective.terms().iter().zip(&terms).map(|(term, mean)| term.weight * mean).sum(),
            terms,
            lr: step.lr,
            grad_norm: f64::NAN,
            gradient_bytes: 0,
            activation_bytes: None,
            tokens: self.counted.iter().sum(),
            seconds: 0.0,
            data_seconds: 0.0,
            skipped: false,
        }
    }
}
