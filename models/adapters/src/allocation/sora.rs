//! SoRA: gates that a proximal step closes ("Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv
//! 2311.11696).

use std::collections::BTreeMap;

use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use lowrank_optim::{HookError, Part, StepInfo};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Allocation, AllocationEntry, AllocationRun, Allocator, read, refused};
use super::model::AllocatedModel;
use crate::ground::error::AdapterError;
use crate::ground::site::Place;
use crate::ground::stack::{Adapter, each_adapter};
use crate::ground::structure::Structure;
use crate::structures::Gated;

pub(super) static ENTRY: AllocationEntry = AllocationEntry {
    entry: Entry {
        papers: &[Paper { title: "Sparse Low-rank Adaptation of Pre-trained Language Models", place: "2311.11696" }],
        needs: &["the structure gated"],
        options: || OptionList::of(&SoRa::default()),
        ..Entry::plain(
            Kind::Allocation,
            "sora",
            "closes the gates of components that the loss does not need; they are left out afterwards",
        )
    },
    structures: &["gated"],
    read: |options| read::<SoRa>(&ENTRY, options),
};

/// Allocation SoRA. The gates have AdamW without decay; their learning rate is an option of the structure
/// ([`GatedOptions::gate_lr_scale`](crate::GatedOptions::gate_lr_scale)).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SoRa {
    /// Strength lambda of the mean magnitude of all gates in the loss.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub lambda: f64,
    /// Threshold xi of the proximal step; 0: no such step.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub threshold: f64,
    /// Threshold itself, or times the learning rate of the gates.
    pub threshold_mode: ThresholdMode,
    /// Proximal step: as the authors' code has it, or soft thresholding as in the paper.
    pub prox: Prox,
    /// Growth of the threshold over the stages of a sparsifying schedule.
    pub schedule: SparsifyingSchedule,
    /// Threshold of the last stage of a sparsifying schedule.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub max_threshold: f64,
    /// Stages of the sparsifying schedule, each as long as the run's own settings say; 1: one threshold.
    #[schemars(range(min = 1, max = 1000))]
    pub stages: usize,
    /// Thresholds of the stages one by one, instead of a schedule; empty: none.
    #[schemars(inner(range(min = 0.0, max = 1e9)))]
    pub thresholds: Vec<f64>,
}

impl Default for SoRa {
    fn default() -> Self {
        Self {
            lambda: 10.0,
            threshold: 3e-4,
            threshold_mode: ThresholdMode::Absolute,
            prox: Prox::Official,
            schedule: SparsifyingSchedule::Linear,
            max_threshold: 7e-4,
            stages: 1,
            thresholds: Vec::new(),
        }
    }
}

/// Unit of the threshold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ThresholdMode {
    /// The threshold itself.
    #[default]
    Absolute,
    /// The threshold times the current learning rate of the gates.
    LrScaled,
}

/// Proximal step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Prox {
    /// As in the authors' code: gates below twice the threshold close.
    #[default]
    Official,
    /// Soft thresholding, as in the paper: gates up to the threshold close.
    Soft,
}

/// Growth of thresholds over stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SparsifyingSchedule {
    /// Equal differences.
    #[default]
    Linear,
    /// Logarithms of equally spaced values.
    LogLinear,
    /// Equal ratios.
    ExpLinear,
}

/// Thresholds from `start` to `max` in `count` stages, 1 at least.
pub fn thresholds(kind: SparsifyingSchedule, start: f64, max: f64, count: usize) -> Vec<f64> {
    let line = |from: f64, to: f64| {
        (0..count).map(move |stage| match count {
            1 => from,
            _ => from + (to - from) * stage as f64 / (count - 1) as f64,
        })
    };
    match kind {
        SparsifyingSchedule::Linear => line(start, max).collect(),
        SparsifyingSchedule::LogLinear => line(start.exp(), max.exp()).map(f64::ln).collect(),
        SparsifyingSchedule::ExpLinear => line(start.ln(), max.ln()).map(f64::exp).collect(),
    }
}

/// The three masked passes of the authors' code, in their order: a gate that one of the first two has moved is seen by the third.
pub fn official_prox<const D: usize>(gates: Tensor<D>, threshold: f64) -> Tensor<D> {
    let above = gates.clone().greater_elem(threshold);
    let gates = gates.clone().mask_where(above, gates.sub_scalar(threshold));
    let below = gates.clone().lower_elem(-threshold);
    let gates = gates.clone().mask_where(below, gates.add_scalar(threshold));
    let small = gates.clone().abs().lower_elem(threshold);
    gates.mask_fill(small, 0.0)
}

/// Soft thresholding: `sign(g) max(|g| - threshold, 0)`.
pub fn soft_prox<const D: usize>(gates: Tensor<D>, threshold: f64) -> Tensor<D> {
    let size = gates.clone().abs().sub_scalar(threshold).clamp_min(0.0);
    gates.sign() * size
}

impl SoRa {
    /// Threshold of each stage.
    pub fn all_thresholds(&self) -> Vec<f64> {
        match (self.thresholds.is_empty(), self.stages) {
            (false, _) => self.thresholds.clone(),
            (true, 1) => vec![self.threshold],
            (true, stages) => thresholds(self.schedule, self.threshold, self.max_threshold, stages),
        }
    }

    /// Gates after the proximal step of a step with this learning rate of the gates.
    pub fn prox(&self, gates: Tensor<1>, threshold: f64, gate_lr: f64) -> Tensor<1> {
        let threshold = match self.threshold_mode {
            ThresholdMode::Absolute => threshold,
            ThresholdMode::LrScaled => threshold * gate_lr,
        };
        match self.prox {
            _ if threshold == 0.0 => gates,
            Prox::Official => official_prox(gates, threshold),
            Prox::Soft => soft_prox(gates, threshold),
        }
    }
}

impl Allocation for SoRa {
    fn entry(&self) -> &'static AllocationEntry {
        &ENTRY
    }

    fn check(&self, _run: &AllocationRun, _layers: &[Place]) -> Result<(), AdapterError> {
        let Self { threshold, max_threshold, stages, .. } = self;
        if !self.thresholds.is_empty() && *stages > 1 {
            return refused(
                "allocation.options.stages",
                stages,
                format!(
                    "allocation.options.thresholds has {} stages already; remove one of the two",
                    self.thresholds.len()
                ),
            );
        }
        if *stages > 1 && max_threshold < threshold {
            return refused(
                "allocation.options.max_threshold",
                max_threshold,
                format!(
                    "the schedule ends before it begins: it must be at least allocation.options.threshold, {threshold}"
                ),
            );
        }
        if *stages > 1 && self.schedule == SparsifyingSchedule::ExpLinear && *threshold <= 0.0 {
            return refused(
                "allocation.options.threshold",
                threshold,
                "equal ratios need a start above 0; raise it, or set allocation.options.schedule to linear",
            );
        }
        Ok(())
    }

    fn stages(&self, steps: Option<u64>) -> Result<Vec<Option<u64>>, AdapterError> {
        Ok(vec![steps; self.all_thresholds().len()])
    }

    fn allocator(&self, run: &AllocationRun) -> Box<dyn Allocator> {
        let threshold = self.all_thresholds().get(run.stage).copied().unwrap_or(self.threshold);
        Box::new(Gates { allocation: self.clone(), adapter: run.adapter.clone(), threshold, part: Vec::new() })
    }
}

#[derive(Debug)]
struct Gates {
    allocation: SoRa,
    adapter: String,
    threshold: f64,
    /// Gates of the part that is being updated.
    part: Vec<ParamId>,
}

impl Gates {
    /// Visits the adapters of the allocation in a part.
    fn each(&self, part: &dyn Part, mut see: impl FnMut(&Adapter, &Gated)) {
        each_adapter(part, |_, stack| {
            for adapter in stack.stack.iter().filter(|adapter| adapter.control().name() == self.adapter) {
                if let Some(gated) = adapter.structure.downcast_ref::<Gated>() {
                    see(adapter, gated);
                }
            }
        });
    }
}

impl Allocator for Gates {
    fn loss_term(&self, _: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        let mut sum: Option<Tensor<1>> = None;
        if self.allocation.lambda == 0.0 {
            return Ok(None);
        }
        self.each(part, |adapter, gated| {
            if gated.gate.dims()[0] > 0 {
                // The derivative of the magnitude is 0 at 0.
                let share = self.allocation.lambda / adapter.control().totals().ranks as f64;
                let term = gated.gate.val().abs().sum().mul_scalar(share);
                sum = Some(match sum.take() {
                    Some(sum) => sum + term,
                    None => term,
                });
            }
        });
        Ok(sum)
    }

    fn after_clipping(
        &mut self,
        _: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        let mut gates = Vec::new();
        self.each(part, |_, gated| gates.push(gated.gate.id));
        self.part = gates;
        Ok(grads)
    }

    fn after_update(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        let mut values = BTreeMap::new();
        self.each(model.part(), |_, gated| {
            if self.part.contains(&gated.gate.id) && gated.gate.dims()[0] > 0 {
                let gates = gated.gate.val().without_autodiff();
                let lr = step.lr * gated.lr_scale("gate");
                values.insert(gated.gate.id, self.allocation.prox(gates, self.threshold, lr));
            }
        });
        self.part.clear();
        model.assign(values);
        Ok(())
    }
}
