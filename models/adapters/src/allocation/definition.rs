//! Interface of an allocation.

use std::fmt::{self, Debug};
use std::ops::Deref;
use std::sync::Arc;

use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_optim::registry::{Entry, OptionError, Options, Registered};
use lowrank_optim::{HookError, Part, StepInfo};
use serde::de::DeserializeOwned;

use super::diffora::DifforaSearch;
use super::model::AllocatedModel;
use super::record::AllocationRecord;
use super::view::LayerAllocation;
use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::site::Place;
use crate::ground::stack::Adapter;

/// An allocation with its options. Most methods have a default that changes nothing.
pub trait Allocation: Debug + Send + Sync {
    /// Returns its entry in the list of allocations.
    fn entry(&self) -> &'static AllocationEntry;

    /// Adjusts the adapter's configuration to the allocation; rejects settings that it does not support. The structure is
    /// checked before.
    fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        Ok(config)
    }

    /// Rejects budgets and schedules that the layers or the length of the run do not allow, with the numbers.
    fn check(&self, _run: &AllocationRun, _layers: &[Place]) -> Result<(), AdapterError> {
        Ok(())
    }

    /// Rejects optimizers that the allocation does not support.
    fn check_optimizer(&self, _method: &str) -> Result<(), AdapterError> {
        Ok(())
    }

    /// Warnings about settings that are allowed but rarely intended.
    fn warnings(&self, _run: &AllocationRun, _layers: &[Place]) -> Vec<String> {
        Vec::new()
    }

    /// Steps of the stages that train one after another, each with a learning-rate schedule of its own, in a run that its settings give a number
    /// of steps; none of them has a number if a time limit ends the run. Rejects a number that is too small.
    fn stages(&self, steps: Option<u64>) -> Result<Vec<Option<u64>>, AdapterError> {
        Ok(vec![steps])
    }

    /// Fraction of the examples that the first stage searches with and does not learn from; none without a search.
    fn search_fraction(&self) -> Option<f64> {
        None
    }

    /// Reason why one process must compute all micro-batches of a step; none if the gradients, which processes sum, are all
    /// that the allocation measures.
    fn needs_one_process(&self) -> Option<String> {
        None
    }

    /// Bytes that the allocation keeps for a layer in addition to the adapter's parameters and their optimizer state, in
    /// steps of this many micro-batches.
    fn state_bytes(&self, _place: &Place, _micro_batches: u64) -> usize {
        0
    }

    /// Rank that the layers have on average at their largest, reserves included; none if it is the one they start with.
    fn largest_rank(&self, _layers: usize) -> Option<usize> {
        None
    }

    /// Work of the allocation around the steps of a run.
    fn allocator(&self, run: &AllocationRun) -> Box<dyn Allocator>;
}

impl dyn Allocation + '_ {
    /// Name in configurations.
    pub fn name(&self) -> &'static str {
        self.entry().entry.name
    }

    /// Same as [`Allocation::prepare`], for a configuration whose structure is checked and that is validated first.
    pub fn prepared(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        let known = self.entry().structures;
        if !known.contains(&config.structure.as_str()) {
            return refused(
                "allocation.name",
                self.name(),
                format!(
                    "it works on the structure {}, not on {}; set adapter.name to it",
                    known.join(" or "),
                    config.structure
                ),
            );
        }
        config.validate()?;
        self.prepare(config)
    }
}

/// Facts of a run that an allocation depends on.
#[derive(Clone, Debug)]
pub struct AllocationRun {
    /// Name of the adapter on the model.
    pub adapter: String,
    /// Seed of all draws.
    pub seed: u64,
    /// Steps before the stage; the steps of a stage are counted from its start.
    pub before: u64,
    /// Number of the stage, from 0.
    pub stage: usize,
    /// Steps of the stage; none if a time limit ends it.
    pub total_steps: Option<u64>,
    /// Micro-batches of a step.
    pub micro_batches: u64,
    /// Learning-rate schedule.
    pub rates: Rates,
}

impl AllocationRun {
    /// A run of one stage with a constant learning rate.
    pub fn constant(adapter: &str, total_steps: Option<u64>, lr: f64) -> Self {
        Self {
            adapter: adapter.into(),
            seed: 0,
            before: 0,
            stage: 0,
            total_steps,
            micro_batches: 1,
            rates: Rates::new(move |_, _| lr),
        }
    }

    /// Number of a step in its stage, from 0.
    pub fn index(&self, step: &StepInfo) -> u64 {
        (step.step - 1).saturating_sub(self.before)
    }
}

/// The learning rate of a step, counted from 0, in a run of a length.
#[derive(Clone)]
pub struct Rates(Arc<dyn Fn(u64, Option<u64>) -> f64 + Send + Sync>);

impl Rates {
    /// Rates of a function of step and length.
    pub fn new(rate: impl Fn(u64, Option<u64>) -> f64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(rate))
    }

    /// The learning rate of a step in a run of `total` steps.
    pub fn rate(&self, step: u64, total: Option<u64>) -> f64 {
        (self.0)(step, total)
    }
}

impl fmt::Debug for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rates").finish_non_exhaustive()
    }
}

/// Work of an allocation around the steps of a run; see [`Hook`](lowrank_optim::Hook) for the order of the calls. Every
/// method does nothing unless it is overridden.
#[allow(unused_variables)]
pub trait Allocator: Debug + Send {
    /// Reason why it needs all gradients at once; none if it also works on one segment after another. Then
    /// [`Allocator::before_update`] and [`Allocator::after_update`] are called once for each segment.
    fn needs_all_gradients(&self) -> Option<String> {
        None
    }

    /// Called before the first forward pass of a step.
    fn begin_step(&mut self, step: &StepInfo, part: &dyn Part) -> Result<(), HookError> {
        Ok(())
    }

    /// The search that changes the model before each step; called after [`Allocator::begin_step`].
    fn search(&mut self) -> Option<&mut DifforaSearch> {
        None
    }

    /// Returns true if there is a search.
    fn searches(&self) -> bool {
        false
    }

    /// Term of shape `[1]` that is added to the mean loss of the step, once a step.
    fn loss_term(&self, step: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        Ok(None)
    }

    /// Changes gradients before they are clipped.
    fn before_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        Ok(grads)
    }

    /// Changes gradients after they are clipped.
    fn after_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        Ok(grads)
    }

    /// Changes the model just before the optimizer's step.
    fn before_update(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        Ok(())
    }

    /// Changes the model just after the optimizer's step.
    fn after_update(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        Ok(())
    }

    /// Changes the model at the end of a step, also of one whose update was skipped. An error ends the run at the next
    /// step.
    fn end_step(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        Ok(())
    }

    /// Returns true if the optimizer starts again without any state; called after [`Allocator::end_step`].
    fn restarts_optimizer(&mut self) -> bool {
        false
    }

    /// Trained parameters that are not updated in this step; called after [`Allocator::begin_step`].
    fn frozen(&self) -> &[ParamId] {
        &[]
    }

    /// Allocation of one layer, for reports: the rank is that of the components that have a part in the update.
    fn layer(&self, path: &str, adapter: &Adapter) -> LayerAllocation {
        LayerAllocation::of(adapter)
    }

    /// State between steps, for a checkpoint.
    fn record(&self) -> AllocationRecord {
        AllocationRecord::default()
    }

    /// Restores the state of a record.
    fn restore(&mut self, record: AllocationRecord) {}
}

/// Entry of the list of allocations.
#[derive(Clone, Copy, Debug)]
pub struct AllocationEntry {
    /// Description of the allocation.
    pub entry: Entry,
    /// Structures that it works on; the first is the one where none is given.
    pub structures: &'static [&'static str],
    /// Reads the allocation with the given options on top of its defaults.
    pub read: fn(&Options) -> Result<Box<dyn Allocation>, AdapterError>,
}

impl Deref for AllocationEntry {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Registered for AllocationEntry {
    fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// Reads an allocation whose fields are its options.
pub(super) fn read<A: Allocation + DeserializeOwned + 'static>(
    entry: &AllocationEntry,
    options: &Options,
) -> Result<Box<dyn Allocation>, AdapterError> {
    let allocation = entry.entry.configure::<A>(options).map_err(|error| error.under("allocation.options"))?;
    Ok(Box::new(allocation))
}

pub(super) fn refused<T>(key: &str, value: impl ToString, reason: impl Into<String>) -> Result<T, AdapterError> {
    Err(OptionError::value(key, value.to_string(), reason).into())
}
