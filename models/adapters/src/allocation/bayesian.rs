//! Ranks and bit widths by gates ("Bayesian-LoRA: LoRA based Parameter Efficient Fine-Tuning using Optimal Quantization
//! levels and Rank Values trough Differentiable Bayesian Gates", arXiv 2406.13046). How the parts are joined is our
//! reading of a paper without code.
//!
//! The structure has the gates and their penalties; the allocation gives logits and ranges an Adam of their own and
//! reports bits and bit operations.

use std::collections::BTreeMap;

use burn::module::ParamId;
use burn::optim::{GradientsParams, Optimizer};
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use lowrank_optim::{AdamWConfig, AdamWState, HookError, Part, StepInfo};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Allocation, AllocationEntry, AllocationRun, Allocator, read};
use super::model::AllocatedModel;
use super::record::AllocationRecord;
use super::view::LayerAllocation;
use crate::ground::site::Place;
use crate::ground::stack::{Adapter, each_adapter};
use crate::structures::{BayesianLora, LEAST_RANGE};

pub(super) static ENTRY: AllocationEntry = AllocationEntry {
    entry: Entry {
        papers: &[
            Paper {
                title: "Bayesian-LoRA: LoRA based Parameter Efficient Fine-Tuning using Optimal Quantization levels and Rank Values trough Differentiable Bayesian Gates",
                place: "2406.13046",
            },
            Paper { title: "Bayesian Bits: Unifying Quantization and Pruning", place: "2005.07093" },
        ],
        needs: &["the structure bayesian-lora"],
        options: || OptionList::of(&Bayesian::default()),
        ..Entry::plain(
            Kind::Allocation,
            "bayesian",
            "learns ranks and bit widths by gates with a prior; how the parts are joined is our reading",
        )
    },
    structures: &["bayesian-lora"],
    read: |options| read::<Bayesian>(&ENTRY, options),
};

/// Allocation of Bayesian-LoRA: Adam without decay for gates and ranges, at learning rates of their own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Bayesian {
    /// Learning rate of the gates' logits.
    #[schemars(range(max = 1e3), extend("exclusiveMinimum" = 0.0))]
    pub lr_gate: f64,
    /// Learning rate of the quantisers' ranges.
    #[schemars(range(max = 1e3), extend("exclusiveMinimum" = 0.0))]
    pub lr_range: f64,
    /// Bits of the activations, for the bit operations that are reported.
    #[schemars(range(min = 1, max = 64))]
    pub activation_bits: usize,
}

impl Default for Bayesian {
    fn default() -> Self {
        Self { lr_gate: 1e-3, lr_range: 1e-3, activation_bits: 32 }
    }
}

impl Allocation for Bayesian {
    fn entry(&self) -> &'static AllocationEntry {
        &ENTRY
    }

    fn warnings(&self, _run: &AllocationRun, layers: &[Place]) -> Vec<String> {
        let short = layers.iter().any(|layer| layer.rank == 1);
        let text = "rank 1 has a single gate of components: a layer is kept or left out as a whole";
        short.then(|| text.to_string()).into_iter().collect()
    }

    fn allocator(&self, _run: &AllocationRun) -> Box<dyn Allocator> {
        Box::new(Gates { options: self.clone(), states: BTreeMap::new(), grads: BTreeMap::new(), still: Vec::new() })
    }
}

#[derive(Debug)]
struct Gates {
    options: Bayesian,
    states: BTreeMap<ParamId, AdamWState<1>>,
    /// Gradients of the part that is being updated.
    grads: BTreeMap<ParamId, Tensor<1>>,
    /// Gates and ranges whose gradient is zero: of an update that is zero no range matters.
    still: Vec<ParamId>,
}

/// Gates and ranges of one adapter: ids, values, and true for ranges.
fn gates(own: &BayesianLora) -> Vec<(ParamId, Tensor<1>, bool)> {
    let phi = own.phi.as_ref().map(|phi| {
        let value = phi.val().without_autodiff();
        let count = value.dims().iter().product::<usize>();
        (phi.id, value.reshape([count]), false)
    });
    let psi = own.psi.as_ref().map(|psi| (psi.id, psi.val().without_autodiff(), false));
    let ranges = own.x_max.as_ref().map(|range| (range.id, range.val().without_autodiff(), true));
    [phi, psi, ranges].into_iter().flatten().collect()
}

fn each(part: &dyn Part, mut see: impl FnMut(&BayesianLora)) {
    each_adapter(part, |_, stack| {
        stack.stack.iter().filter_map(|adapter| adapter.structure.downcast_ref::<BayesianLora>()).for_each(&mut see);
    });
}

impl Allocator for Gates {
    fn before_clipping(
        &mut self,
        _: &StepInfo,
        part: &dyn Part,
        mut grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        self.grads.clear();
        self.still.clear();
        each(part, |own| {
            for (id, value, _) in gates(own) {
                let [count] = value.dims();
                let is_levels = own.phi.as_ref().is_some_and(|phi| phi.id == id);
                let grad = match is_levels {
                    true => grads.remove::<2>(id).map(|grad| grad.reshape([count])),
                    false => grads.remove::<1>(id),
                };
                if let Some(grad) = grad {
                    if host(grad.clone()).iter().all(|value| *value == 0.0) {
                        self.still.push(id);
                    }
                    self.grads.insert(id, grad);
                }
            }
        });
        Ok(grads)
    }

    fn before_update(&mut self, _: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        let adam = AdamWConfig::new().with_weight_decay(0.0).build();
        let mut values = BTreeMap::new();
        each(model.part(), |own| {
            for (id, value, is_range) in gates(own) {
                let Some(grad) = self.grads.remove(&id) else { continue };
                let lr = if is_range { self.options.lr_range } else { self.options.lr_gate };
                let (value, state) = adam.step(lr, value, grad, self.states.remove(&id));
                self.states.extend(state.map(|state| (id, state)));
                values.insert(id, if is_range { value.clamp_min(LEAST_RANGE) } else { value });
            }
        });
        model.assign(values);
        Ok(())
    }

    fn frozen(&self) -> &[ParamId] {
        &self.still
    }

    fn layer(&self, _path: &str, adapter: &Adapter) -> LayerAllocation {
        let mut layer = LayerAllocation::of(adapter);
        if let Some(own) = adapter.structure.downcast_ref::<BayesianLora>() {
            let [a, e, b] = own.bits().map(|bits| bits as f64);
            let [operations, dense] = own.bit_operations(self.options.activation_bits);
            let figures = [("bits_a", a), ("bits_e", e), ("bits_b", b), ("bops", operations)];
            layer.figures.extend(figures);
            layer.figures.insert("relative_bops", operations / dense);
        }
        layer
    }

    fn record(&self) -> AllocationRecord {
        let mut record = AllocationRecord::default();
        for (id, state) in &self.states {
            let id = id.val();
            record.put_numbers(format!("time.{id}"), vec![state.time as f64]);
            record.put(format!("moment_1.{id}"), state.moment_1.to_data());
            record.put(format!("moment_2.{id}"), state.moment_2.to_data());
        }
        record
    }

    fn restore(&mut self, mut record: AllocationRecord) {
        let device = Device::default();
        let tensor = |data: TensorData| Tensor::<1>::from_data(data, &device);
        for (name, first) in record.take_all("moment_1.") {
            let second = record.take(&format!("moment_2.{name}"));
            let time = record.take_numbers(&format!("time.{name}"));
            if let (Ok(id), Some(second), Some(time)) = (name.parse::<u64>(), second, time) {
                let state = AdamWState { time: time[0] as usize, moment_1: tensor(first), moment_2: tensor(second) };
                self.states.insert(ParamId::from(id), state);
            }
        }
    }
}
