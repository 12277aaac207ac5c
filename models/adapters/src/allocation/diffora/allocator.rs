//! Work of the search around the steps of a run: weights that no optimizer moves, the choice at its end, and pairs
//! of factors that several layers share.

use std::collections::BTreeMap;

use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_optim::{HookError, Part, StepInfo};

use super::options::{DiffoRa, Sharing};
use super::search::{DifforaSearch, layers, selection};
use super::sharing::SharedPairs;
use crate::allocation::definition::{AllocationRun, Allocator};
use crate::allocation::model::{AllocatedModel, Rebuild};
use crate::allocation::record::AllocationRecord;
use crate::allocation::view::LayerAllocation;
use crate::ground::any::AnyStructure;
use crate::ground::entry::StructureEntry;
use crate::ground::error::AdapterError;
use crate::ground::site::{Site, Size};
use crate::ground::stack::Adapter;
use crate::structures::Diffora;

/// Figure of a layer: 1 if it keeps an adapter of its own, otherwise 0.
pub const SELECTED: &str = "selected";

/// Name of the search's moments in a record.
const MOMENTS: &str = "moments";

/// The search in its first stage, the training of the selected layers in the second.
#[derive(Debug)]
pub(super) struct Selecting {
    options: DiffoRa,
    run: AllocationRun,
    /// Layers that were selected, once the search is over.
    selected: BTreeMap<String, bool>,
    pairs: SharedPairs,
    frozen: Vec<ParamId>,
    ended: bool,
    /// The search, from the first step on.
    search: Option<DifforaSearch>,
    /// Moments of the search, of a checkpoint.
    moments: AllocationRecord,
}

impl Selecting {
    pub fn new(options: DiffoRa, run: AllocationRun) -> Self {
        let (selected, pairs) = (BTreeMap::new(), SharedPairs::default());
        let moments = AllocationRecord::default();
        Self { options, run, selected, pairs, frozen: Vec::new(), ended: false, search: None, moments }
    }

    /// Gives selected layers factors of their own, the others those of their type or none; all weights become 1.
    fn discretise(&mut self, model: &mut dyn AllocatedModel) -> Result<(), AdapterError> {
        let (name, DiffoRa { sharing, warm_start, .. }) = (&self.run.adapter, &self.options);
        self.selected = selection(&self.options, model.part(), name).into_iter().collect();
        let before = layers(model.part(), name);
        let is_selected = |path: &str| self.selected.get(path).copied().unwrap_or_default();
        model.rebuild(&mut |path, adapter: &Adapter| {
            let rank = match (is_selected(path), sharing) {
                (true, _) if *warm_start => return None,
                (true, _) | (false, Sharing::Pair) => adapter.place().rank,
                (false, Sharing::None) => 0,
            };
            let make = |structure: &AnyStructure, site: &mut Site<'_>| {
                StructureEntry::find(structure.spec().name)?.resize(structure, &[], site)
            };
            Some(Rebuild { size: Size { rank, ..adapter.place().size() }, make: Box::new(make) })
        })?;
        let mut values = BTreeMap::new();
        for layer in &before {
            let own = &layer.structure;
            if is_selected(&layer.path) && *warm_start {
                let b = own.b.val().without_autodiff() * own.gamma.val().without_autodiff().unsqueeze::<2>();
                let count = b.dims().iter().product::<usize>();
                values.insert(own.b.id, b.reshape([count]));
            }
            let device = own.gamma.val().without_autodiff().device();
            values.insert(own.gamma.id, Tensor::from_data(TensorData::new(vec![1f32], [1]), &device));
        }
        model.assign(values);
        if *sharing == Sharing::Pair {
            let pairs = SharedPairs::of(model.part(), name, &is_selected)?;
            model.assign(pairs.following(model.part()));
        }
        Ok(())
    }
}

impl Allocator for Selecting {
    fn needs_all_gradients(&self) -> Option<String> {
        let reason = match self.run.stage {
            0 => "the search takes gradients of a second batch through the whole model",
            _ if self.options.sharing == Sharing::Pair => "layers of all blocks share their factors",
            _ => return None,
        };
        Some(reason.into())
    }

    fn begin_step(&mut self, _: &StepInfo, part: &dyn Part) -> Result<(), HookError> {
        let name = &self.run.adapter;
        if self.run.stage > 0 && self.selected.is_empty() {
            self.selected = selection(&self.options, part, name).into_iter().collect();
            if self.options.sharing == Sharing::Pair {
                let is_selected = |path: &str| self.selected.get(path).copied().unwrap_or_default();
                self.pairs = SharedPairs::of(part, name, &is_selected)?;
            }
        }
        if self.run.stage == 0 && self.search.is_none() {
            let mut search = DifforaSearch::new(self.options.clone(), part, name)?;
            if let Some(moments) = self.moments.take(MOMENTS).and_then(|data| data.try_into_vec().ok()) {
                search.load_bytes(moments)?;
            }
            self.search = Some(search);
        }
        self.frozen = layers(part, name).iter().map(|layer| layer.structure.gamma.id).collect();
        self.frozen.extend(self.pairs.followers());
        Ok(())
    }

    fn search(&mut self) -> Option<&mut DifforaSearch> {
        self.search.as_mut()
    }

    fn searches(&self) -> bool {
        self.run.stage == 0
    }

    fn before_clipping(
        &mut self,
        _: &StepInfo,
        part: &dyn Part,
        mut grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        for layer in layers(part, &self.run.adapter) {
            grads.remove::<1>(layer.structure.gamma.id);
        }
        Ok(self.pairs.gather(grads))
    }

    fn after_update(&mut self, _: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        let values = self.pairs.following(model.part());
        model.assign(values);
        Ok(())
    }

    fn end_step(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        if self.run.stage == 0 && self.run.total_steps == Some(self.run.index(step) + 1) {
            self.discretise(model)?;
            self.ended = true;
            self.search = None;
        }
        Ok(())
    }

    fn restarts_optimizer(&mut self) -> bool {
        std::mem::take(&mut self.ended)
    }

    fn frozen(&self) -> &[ParamId] {
        &self.frozen
    }

    fn record(&self) -> AllocationRecord {
        let Some(search) = &self.search else { return self.moments.clone() };
        let bytes = search.to_bytes();
        let mut record = AllocationRecord::default();
        record.put(MOMENTS, TensorData::new(bytes.clone(), [bytes.len()]));
        record
    }

    fn restore(&mut self, record: AllocationRecord) {
        self.moments = record;
    }

    fn layer(&self, path: &str, adapter: &Adapter) -> LayerAllocation {
        let mut layer = LayerAllocation::of(adapter);
        if let Some(own) = adapter.structure.downcast_ref::<Diffora>() {
            let weight = host(own.gamma.val().without_autodiff());
            layer.figures.insert("weight", f64::from(weight[0]));
        }
        if let Some(selected) = self.selected.get(path) {
            layer.figures.insert(SELECTED, f64::from(u8::from(*selected)));
        }
        layer
    }
}
