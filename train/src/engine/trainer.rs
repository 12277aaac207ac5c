//! Trainer that runs one step after another.

use std::time::Instant;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::Device;
use lowrank_models::adapter::{self, AdapterSteps, Control, PassInfo};
use lowrank_models::{Segment, SegmentedModel};
use lowrank_optim::{GlobalNormClip, HookError, Hooks, Losses, OptimError, StepInfo};

use super::TrainError;
use super::activations::{Activations, Live};
use super::means::Means;
use super::micro::MicroBatch;
use super::moved::Fingerprints;
use super::options::{BackwardMode, TrainerOptions};
use super::report::StepReport;
use super::segments::{Gather, Measured, Update};
use super::sums::sum_gradients;
use super::updates::Updates;
use crate::objective::{Objective, SEARCH, Streams};
use crate::process::Peers;

/// Model in training, with its optimizer and progress.
pub struct Trainer<M: SegmentedModel> {
    pub(super) updates: Updates<M>,
    pub(super) objective: Objective<M>,
    pub(super) options: TrainerOptions,
    /// Number of hooks that belong to all stages; those of the stage follow them.
    pub(super) lasting_hooks: usize,
    /// Steps and samples before the stage.
    pub(super) before_stage: [u64; 2],
    pub(super) device: Device,
    /// Processes that share the step.
    peers: Peers,
    /// Segment at which the backward pass ends; none if nothing is trained.
    lowest: Option<Segment>,
    /// Handles of the model's adapters.
    controls: Vec<Control>,
    /// Number of steps taken.
    pub step: u64,
    /// Number of samples (rows of batches) seen.
    pub samples: u64,
    /// Number of tokens that were not ignored.
    pub tokens: u64,
    /// Number of steps skipped because of a non-finite value.
    pub skipped_steps: u64,
    /// Memory kept by forward passes of the current step.
    activations: Activations,
}

/// Learning rate below which a step may be smaller than the spacing of f32 around 1, and correctly change nothing.
const SMALLEST_VISIBLE_RATE: f64 = 1e-6;

impl<M: SegmentedModel> Trainer<M> {
    /// Creates a trainer before the first step, with the model's own loss as objective. The model must be on an
    /// autodiff device; its frozen parameters and its adapters do not change. Penalties of adapters are added to the
    /// hooks, after those that are given.
    pub fn new(model: M, optimizer: ModuleOptimizer, hooks: Hooks<M>, options: TrainerOptions) -> Self {
        Self {
            device: plain_device(&model),
            peers: Peers::of_process(),
            lowest: Segment::lowest_trained(&model),
            controls: adapter::adapters_of(&model),
            lasting_hooks: hooks.iter().count() + 1,
            before_stage: [0, 0],
            updates: Updates::new(model, optimizer, hooks.with(AdapterSteps::default())),
            objective: Objective::default(),
            options,
            step: 0,
            samples: 0,
            tokens: 0,
            skipped_steps: 0,
            activations: Activations::default(),
        }
    }

    /// Sets another objective.
    pub fn with_objective(self, objective: Objective<M>) -> Self {
        Self { objective, ..self }
    }

    /// Lowest segment with a trained tensor.
    fn lowest(&self) -> Result<Segment, TrainError> {
        self.lowest.ok_or(TrainError::NothingTrained)
    }

    /// Current model.
    pub fn model(&self) -> &M {
        self.updates.model()
    }

    /// Takes one step on the next samples. `observe` receives the gradients before clipping; none if blocks are updated
    /// one by one.
    pub fn step(
        &mut self,
        streams: &Streams<'_, M::Batch>,
        observe: &mut dyn FnMut(&M, &GradientsParams),
    ) -> Result<StepReport, TrainError> {
        let (begin, before) = (Instant::now(), self.peers.traffic());
        let step = self.step_info();
        let first = streams.get(&self.objective.terms()[0].stream)?.batch() as u64;
        let samples = self.samples - self.before_stage[1];
        let micro = self.read(streams, [samples, first])?;
        let data_seconds = begin.elapsed().as_secs_f64();
        let counted = self.counted(&micro)?;
        self.lowest()?;
        let objective = self.objective.clone();
        let means = Means { objective: &objective, counted: &counted };
        self.updates.begin_step(&step)?;
        self.activations = Activations::default();
        if self.updates.hooks.searches() {
            let further = self.read(&Streams::one(streams.get(SEARCH)?), [samples, first])?;
            self.search(&step, &micro, &further)?;
        }
        let result = match self.options.backward {
            BackwardMode::PerLayer => self.step_by_block(&step, &micro, &means, observe),
            _ => self.step_at_once(&step, &micro, &means, observe),
        };
        // Code that reads the model between steps must not see dropout.
        self.set_pass(PassInfo::default());
        let mut report = result?;
        self.finish(&step, micro.len() as u64 * self.peers.size() as u64 * first, report.tokens);
        report.activation_bytes = self.activations.most();
        report.seconds = begin.elapsed().as_secs_f64();
        report.data_seconds = data_seconds;
        let now = self.peers.traffic();
        report.sent_bytes = now.sent - before.sent;
        report.communication_seconds = (now.nanoseconds - before.nanoseconds) as f64 / 1e9;
        Ok(report)
    }

    /// Position and learning rate of the next step.
    fn step_info(&self) -> StepInfo {
        let schedule = &self.options.schedule;
        let step = self.step + 1;
        let total = schedule.total_steps.map(|steps| steps + self.before_stage[0]);
        StepInfo { step, total, lr: self.rate(step), peak_lr: schedule.peak }
    }

    /// Learning rate of a step of the run.
    fn rate(&self, step: u64) -> f64 {
        self.options.schedule.rate(step.saturating_sub(self.before_stage[0]))
    }

    /// Place of a micro-batch of this process among those of all: the processes take turns.
    fn place(&self, number: u64) -> u64 {
        number * self.peers.size() as u64 + self.peers.rank() as u64
    }

    /// The micro-batches of this process, after `samples` rows of the first stream, in batches of `batch` rows.
    fn read(
        &self,
        streams: &Streams<'_, M::Batch>,
        [samples, batch]: [u64; 2],
    ) -> Result<Vec<MicroBatch<M>>, TrainError> {
        let read =
            |number| MicroBatch::read(&self.objective, streams, [samples, batch, self.place(number)], &self.device);
        (0..self.options.accumulation as u64).map(read).collect()
    }

    /// Lets hooks change the model by gradients over the batches of the step and over further ones.
    fn search(
        &mut self,
        step: &StepInfo,
        micro: &[MicroBatch<M>],
        further: &[MicroBatch<M>],
    ) -> Result<(), TrainError> {
        let mut hooks = std::mem::take(&mut self.updates.hooks);
        let found = hooks.search(step, self.model(), &mut At { trainer: self, step, micro, further });
        self.updates.hooks = hooks;
        self.updates.replace(found.map_err(TrainError::hook)?);
        Ok(())
    }

    /// Number of losses of each term, over all micro-batches of all processes.
    fn counted(&self, micro: &[MicroBatch<M>]) -> Result<Vec<u64>, TrainError> {
        let mut sums = MicroBatch::counted_in(micro);
        self.peers.sum_counts(&mut sums);
        match sums.iter().position(|sum| *sum == 0) {
            None => Ok(sums),
            Some(term) => {
                Err(TrainError::NoTargets { step: self.step + 1, stream: self.objective.terms()[term].stream.clone() })
            }
        }
    }

    /// Runs a step in which all gradients exist before the update.
    fn step_at_once(
        &mut self,
        step: &StepInfo,
        micro: &[MicroBatch<M>],
        means: &Means<'_, M>,
        observe: &mut dyn FnMut(&M, &GradientsParams),
    ) -> Result<StepReport, TrainError> {
        let mut activations = std::mem::take(&mut self.activations);
        let found = self.gradients(self.model(), &self.updates.hooks, step, micro, means, &mut activations);
        self.activations = activations;
        let (mut sums, grads) = found?;
        self.peers.sum_numbers(&mut sums);
        let grads = sum_gradients(self.peers, self.model(), grads)?;
        let grads = self.updates.before_clipping(step, None, grads)?;
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
                    before.excuse(self.model(), &clipped.grads, &self.updates.hooks.frozen());
                }
                self.updates.update(step, None, clipped.grads)?;
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

    /// Sum of the losses of each term at a model, and the gradient of the weighted sum of their means over all micro-batches: each
    /// micro-batch is weighted by its number of losses.
    fn gradients(
        &self,
        model: &M,
        hooks: &Hooks<M>,
        step: &StepInfo,
        micro: &[MicroBatch<M>],
        means: &Means<'_, M>,
        activations: &mut Activations,
    ) -> Result<(Vec<f64>, GradientsParams), TrainError> {
        let mut accumulator = GradientsAccumulator::new();
        let mut sums = vec![0.0; means.counted.len()];
        for (number, batches) in micro.iter().enumerate() {
            let micro_batch = self.place(number as u64);
            let first = micro_batch == 0;
            self.set_pass(self.pass_of(micro_batch, micro.len()));
            if self.options.backward == BackwardMode::Checkpointed {
                let mut gather = Gather {
                    model,
                    hooks,
                    step,
                    first,
                    accumulator: &mut accumulator,
                    measured: Measured::new(&self.device),
                };
                let found = means.walk(batches, self.lowest()?, &mut gather)?;
                let measured = gather.measured.activations;
                activations.note(measured.most());
                sums.iter_mut().zip(found).for_each(|(sum, found)| *sum += found);
                continue;
            }
            let begin = Live::of(&self.device);
            let losses = batches.losses(means.objective, model);
            activations.note(begin.grown(&self.device));
            for (sum, loss) in sums.iter_mut().zip(&losses) {
                *sum += f64::from(loss.clone().inner().into_scalar::<f32>());
            }
            let means = losses.into_iter().zip(means.divisors()).map(|(loss, divisor)| loss.div_scalar(divisor));
            let mut loss = match means.reduce(|sum, loss| sum + loss) {
                Some(loss) => loss,
                None => unreachable!("an objective has at least one term"),
            };
            // Added once per step: they are not part of the mean over the micro-batches.
            if first && let Some(term) = hooks.loss_term(step, model).map_err(TrainError::hook)? {
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

    /// Runs a step in which each block is updated before the gradients of the one below it exist.
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
        if let Some((hook, reason)) = self.updates.hooks.needs_all_gradients() {
            return Err(TrainError::AllGradients { hook, reason });
        }
        observe(self.model(), &GradientsParams::new());
        self.set_pass(self.pass_of(self.place(0), 1));
        let lowest = self.lowest()?;
        let mut update = Update {
            step,
            clip: GlobalNormClip::new(self.options.block_clip),
            fingerprints: self.checks_moved(step.lr).then(|| Fingerprints::of(self.model())),
            squares: 0.0,
            most: 0,
            measured: Measured::new(&self.device),
            updates: &mut self.updates,
            peers: self.peers,
        };
        let mut sums = means.walk(batches, lowest, &mut update)?;
        let Update { fingerprints, squares, most, measured, .. } = update;
        self.activations = measured.activations;
        self.peers.sum_numbers(&mut sums);
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

    /// Completes a step after its update, or after skipping it.
    fn finish(&mut self, step: &StepInfo, samples: u64, tokens: u64) {
        self.updates.end_step(step);
        self.step = step.step;
        self.samples += samples;
        self.tokens += tokens;
    }

    /// Returns true if this update is the first that must change every tensor: the first of all, or the first after a
    /// learning rate of 0.
    fn checks_moved(&self, lr: f64) -> bool {
        let first = self.step == self.skipped_steps || self.rate(self.step) < SMALLEST_VISIBLE_RATE;
        first && lr >= SMALLEST_VISIBLE_RATE
    }

    /// Forward pass of a micro-batch of the current step, of which each process has `count`.
    fn pass_of(&self, micro_batch: u64, count: usize) -> PassInfo {
        let micro_batches = count as u64 * self.peers.size() as u64;
        let pass = PassInfo::training(self.step, self.options.schedule.total_steps);
        PassInfo { micro_batch, micro_batches, ..pass }
    }

    fn set_pass(&self, pass: PassInfo) {
        self.controls.iter().for_each(|control| control.set_pass(pass.clone()));
    }
}

/// Gradients over the batches of a step, and over those of its search.
struct At<'a, M: SegmentedModel> {
    trainer: &'a Trainer<M>,
    step: &'a StepInfo,
    micro: &'a [MicroBatch<M>],
    further: &'a [MicroBatch<M>],
}

impl<M: SegmentedModel> At<'_, M> {
    fn gradients(&self, model: &M, micro: &[MicroBatch<M>]) -> Result<GradientsParams, HookError> {
        let counted = self.trainer.counted(micro)?;
        let means = Means { objective: &self.trainer.objective, counted: &counted };
        let mut activations = Activations::default();
        let (_, grads) = self.trainer.gradients(model, &Hooks::new(), self.step, micro, &means, &mut activations)?;
        Ok(sum_gradients(self.trainer.peers, model, grads)?)
    }
}

impl<M: SegmentedModel> Losses<M> for At<'_, M> {
    fn training(&mut self, model: &M) -> Result<GradientsParams, HookError> {
        self.gradients(model, self.micro)
    }

    fn held_out(&mut self, model: &M) -> Result<GradientsParams, HookError> {
        self.gradients(model, self.further)
    }
}

/// Plain device (without autodiff) of a model.
pub(super) fn plain_device<M: Module>(model: &M) -> Device {
    model.devices().into_iter().next().map_or_else(Device::default, Device::inner)
}
