//! An allocation as a hook of any training loop.

use std::collections::BTreeMap;

use burn::module::{Module, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord, SgdConfig};
use burn::tensor::Tensor;
use lowrank_optim::{Hook, HookError, Losses, Part, StepInfo};

use super::definition::{Allocation, AllocationRun, Allocator};
use super::model::Model;
use super::record::AllocationRecord;
use super::view::AllocationView;
use crate::ground::stack::each_adapter;

/// Runs an allocation around the steps of a training loop.
#[derive(Debug)]
pub struct AllocationHook {
    allocator: Box<dyn Allocator>,
    adapter: String,
    view: AllocationView,
    /// Error of a call that cannot return one.
    failed: Option<HookError>,
}

impl AllocationHook {
    /// Hook of an allocation for the adapter that the run names.
    pub fn new(allocation: &dyn Allocation, run: &AllocationRun) -> Self {
        Self {
            allocator: allocation.allocator(run),
            adapter: run.adapter.clone(),
            view: AllocationView::default(),
            failed: None,
        }
    }

    /// Ranks by layer as of the last step, shared with the hook.
    pub fn view(&self) -> AllocationView {
        self.view.clone()
    }

    /// Writes the allocation of the model's layers to the view, as the end of each step does.
    pub fn look(&self, part: &dyn Part) {
        let mut layers = BTreeMap::new();
        each_adapter(part, |path, stack| {
            if let Some(adapter) = stack.stack.iter().find(|adapter| adapter.control().name() == self.adapter) {
                layers.insert(path.to_string(), self.allocator.layer(path, adapter));
            }
        });
        self.view.set(layers);
    }
}

impl<M: Module> Hook<M> for AllocationHook {
    fn name(&self) -> &'static str {
        "allocation"
    }

    fn needs_all_gradients(&self) -> Option<String> {
        self.allocator.needs_all_gradients()
    }

    fn begin_step(&mut self, step: &StepInfo, model: &M) -> Result<(), HookError> {
        match self.failed.take() {
            Some(error) => Err(error),
            None => self.allocator.begin_step(step, model),
        }
    }

    fn searches(&self) -> bool {
        self.allocator.searches()
    }

    fn search(&mut self, step: &StepInfo, model: &M, losses: &mut dyn Losses<M>) -> Result<M, HookError> {
        match self.allocator.search() {
            Some(search) => search.step(step.lr, model, losses),
            None => Ok(model.clone()),
        }
    }

    fn loss_term(&self, step: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        self.allocator.loss_term(step, part)
    }

    fn before_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        self.allocator.before_clipping(step, part, grads)
    }

    fn after_clipping(
        &mut self,
        step: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        self.allocator.after_clipping(step, part, grads)
    }

    fn before_update(&mut self, step: &StepInfo, mut model: M) -> M {
        self.failed = self.allocator.before_update(step, &mut Model::new(&mut model, &self.adapter)).err();
        model
    }

    fn after_update(&mut self, step: &StepInfo, model: &mut M) -> Result<(), HookError> {
        match self.failed.take() {
            Some(error) => Err(error),
            None => self.allocator.after_update(step, &mut Model::new(model, &self.adapter)),
        }
    }

    fn end_step(&mut self, step: &StepInfo, mut model: M, optimizer: &mut ModuleOptimizer) -> M {
        self.failed = self.allocator.end_step(step, &mut Model::new(&mut model, &self.adapter)).err();
        if self.allocator.restarts_optimizer() {
            let before = std::mem::replace(optimizer, SgdConfig::new().init());
            *optimizer = before.load_record(OptimizerRecord::default());
        }
        self.look(&model);
        model
    }

    fn frozen(&self) -> &[ParamId] {
        self.allocator.frozen()
    }

    fn to_record(&self) -> OptimizerRecord {
        self.allocator.record().into()
    }

    fn load_record(&mut self, record: OptimizerRecord) {
        self.allocator.restore(AllocationRecord::from(record));
    }
}
