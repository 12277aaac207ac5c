//! AdaLoRA: the components that matter least are masked, over all layers ("Adaptive Budget Allocation for Parameter-Efficient
//! Fine-Tuning", arXiv 2303.10512).

use std::collections::BTreeMap;

use burn::module::{Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use lowrank_optim::{HookError, Part, StepInfo};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Allocation, AllocationEntry, AllocationRun, Allocator, read, refused};
use super::importance::Importance;
use super::model::AllocatedModel;
use super::record::AllocationRecord;
use super::triplets::{each_triplet, orthogonality};
use super::view::LayerAllocation;
use crate::ground::error::AdapterError;
use crate::ground::site::Place;
use crate::ground::stack::Adapter;

pub(super) static ENTRY: AllocationEntry = AllocationEntry {
    entry: Entry {
        papers: &[Paper {
            title: "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
            place: "2303.10512",
        }],
        memory: "2 r (d_in + d_out + 1)",
        needs: &["the structure triplet", "a known number of steps"],
        options: || OptionList::of(&AdaLora::default()),
        ..Entry::plain(
            Kind::Allocation,
            "adalora",
            "masks the components of all layers that matter least, down to a budget",
        )
    },
    structures: &["triplet"],
    read: |options| read::<AdaLora>(&ENTRY, options),
};

/// Allocation AdaLoRA. The rank of the adapter is that at the start of each layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdaLora {
    /// Average rank of the layers at the end.
    #[schemars(range(min = 1, max = 131_072))]
    pub target_rank: usize,
    /// Sum of the ranks of all layers at the end, instead of an average.
    #[schemars(range(min = 1))]
    pub total_rank: Option<usize>,
    /// Steps before the budget falls.
    pub t_init: u64,
    /// Steps at the end whose pattern no longer changes.
    pub t_final: u64,
    /// Steps between maskings.
    #[schemars(range(min = 1))]
    pub delta_t: u64,
    /// Smoothing of the sensitivities.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub beta_1: f64,
    /// Smoothing of their deviations.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub beta_2: f64,
    /// Weight gamma of the distance of the factors from being orthonormal.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub orth_weight: f64,
}

impl Default for AdaLora {
    fn default() -> Self {
        Self {
            target_rank: 8,
            total_rank: None,
            t_init: 0,
            t_final: 0,
            delta_t: 1,
            beta_1: 0.85,
            beta_2: 0.85,
            orth_weight: 0.5,
        }
    }
}

/// Cubic budget of components over the steps of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetSchedule {
    /// Components at the start.
    pub initial: usize,
    /// Components at the end.
    pub target: usize,
    /// Steps of the run.
    pub total_steps: u64,
    /// Steps before the budget falls.
    pub t_init: u64,
    /// Steps at the end with the target.
    pub t_final: u64,
    /// Steps between maskings.
    pub delta_t: u64,
}

impl BudgetSchedule {
    /// Budget after a step, counted from 0, and true if components are masked after it.
    pub fn at(&self, step: u64) -> (usize, bool) {
        let end = self.total_steps.saturating_sub(self.t_final);
        if step <= self.t_init {
            return (self.initial, false);
        }
        if step >= end {
            return (self.target, true);
        }
        let left = 1.0 - (step - self.t_init) as f64 / (end - self.t_init) as f64;
        let over = (self.initial - self.target) as f64 * left.powf(3.0);
        ((self.target as f64 + over) as usize, step.is_multiple_of(self.delta_t))
    }

    /// Step after which the pattern is fixed: with the target, also where no masking is due.
    pub fn fixed_at(&self) -> u64 {
        self.total_steps.saturating_sub(self.t_final).min(self.total_steps.saturating_sub(1))
    }
}

impl AdaLora {
    fn target(&self, layers: usize) -> usize {
        self.total_rank.unwrap_or(self.target_rank * layers)
    }

    /// Key and value of the target that is set.
    fn target_key(&self) -> (&'static str, usize) {
        match self.total_rank {
            Some(total) => ("allocation.options.total_rank", total),
            None => ("allocation.options.target_rank", self.target_rank),
        }
    }
}

impl Allocation for AdaLora {
    fn entry(&self) -> &'static AllocationEntry {
        &ENTRY
    }

    fn check(&self, run: &AllocationRun, layers: &[Place]) -> Result<(), AdapterError> {
        let Some(total) = run.total_steps else {
            return refused(
                "allocation.name",
                "adalora",
                "its budget follows the steps of the run: set train.steps or train.epochs, and train.minutes to 0",
            );
        };
        let initial: usize = layers.iter().map(|layer| layer.rank).sum();
        let (target, (key, value)) = (self.target(layers.len()), self.target_key());
        if target == 0 {
            return refused(key, value, "the budget must be at least 1");
        }
        if target > initial {
            return refused(
                key,
                value,
                format!(
                    "the budget of {target} components is above the {initial} that {} layers start with; lower it, or raise adapter.rank",
                    layers.len()
                ),
            );
        }
        if self.delta_t == 0 {
            return refused("allocation.options.delta_t", 0, "it must be at least 1");
        }
        if self.t_init.saturating_add(self.t_final) >= total {
            return refused(
                "allocation.options.t_init",
                self.t_init,
                format!(
                    "the budget would stop falling before it begins: t_init + allocation.options.t_final = {} must be below the {total} steps of the run",
                    self.t_final
                ),
            );
        }
        Ok(())
    }

    fn warnings(&self, _run: &AllocationRun, layers: &[Place]) -> Vec<String> {
        let initial: usize = layers.iter().map(|layer| layer.rank).sum();
        match self.target(layers.len()) == initial {
            true => {
                vec![format!("adalora with a budget of {initial}, the rank of all layers together: nothing is masked")]
            }
            false => Vec::new(),
        }
    }

    fn state_bytes(&self, place: &Place, _micro_batches: u64) -> usize {
        let [d_in, d_out] = place.shape;
        8 * place.rank * (d_in + d_out + 1)
    }

    fn allocator(&self, run: &AllocationRun) -> Box<dyn Allocator> {
        Box::new(Masked {
            allocation: self.clone(),
            run: run.clone(),
            importance: BTreeMap::new(),
            grads: BTreeMap::new(),
            pattern: None,
            masked: false,
            restored_total: None,
        })
    }
}

#[derive(Debug)]
struct Masked {
    allocation: AdaLora,
    run: AllocationRun,
    importance: BTreeMap<ParamId, Importance>,
    /// Gradients of this step, flat.
    grads: BTreeMap<ParamId, Tensor<1>>,
    /// Components that are kept, of all layers one after the other, once they are fixed.
    pattern: Option<Vec<bool>>,
    masked: bool,
    /// Steps of the run that a restored state belongs to.
    restored_total: Option<u64>,
}

/// A parameter without its graph, flat.
fn flat<const D: usize>(param: &Param<Tensor<D>>) -> (ParamId, Tensor<1>) {
    let value = param.val().without_autodiff();
    let count = value.shape().num_elements();
    (param.id, value.reshape([count]))
}

impl Masked {
    fn schedule(&self, part: &dyn Part) -> BudgetSchedule {
        let (mut initial, mut layers) = (0, 0);
        each_triplet(part, &self.run.adapter, |_, adapter, _| {
            initial += adapter.place().rank;
            layers += 1;
        });
        let AdaLora { t_init, t_final, delta_t, .. } = self.allocation;
        let total_steps = self.run.total_steps.unwrap_or(u64::MAX);
        BudgetSchedule { initial, target: self.allocation.target(layers), total_steps, t_init, t_final, delta_t }
    }

    /// Adds the sensitivities of the step: parameters times their gradients.
    fn add_sensitivities(&mut self, part: &dyn Part) {
        let (beta_1, beta_2) = (self.allocation.beta_1, self.allocation.beta_2);
        let (grads, importance) = (std::mem::take(&mut self.grads), &mut self.importance);
        let mut add = |(id, value): (ParamId, Tensor<1>)| {
            let Some(grad) = grads.get(&id) else { return };
            let known = importance.entry(id).or_insert_with(|| Importance::new(value.dims()[0], &value.device()));
            known.add((value * grad.clone()).abs(), beta_1, beta_2);
        };
        each_triplet(part, &self.run.adapter, |_, _, triplet| {
            triplet.a.iter().chain(&triplet.b).for_each(|block| add(flat(block)));
            triplet.e.iter().for_each(|block| add(flat(block)));
        });
    }

    /// Scores of the components of all layers, one after the other.
    fn scores(&self, part: &dyn Part) -> Vec<f32> {
        let mut scores = Vec::new();
        let of = |id: &ParamId, shape: [usize; 2], axis: usize| match self.importance.get(id) {
            Some(importance) => host(importance.score().reshape(shape).mean_dim(axis)),
            None => vec![0.0; shape[1 - axis]],
        };
        each_triplet(part, &self.run.adapter, |_, _, triplet| {
            for ((a, e), b) in triplet.a.iter().zip(&triplet.e).zip(&triplet.b) {
                let [at_input, at_output] = [of(&a.id, a.dims(), 0), of(&b.id, b.dims(), 1)];
                let values = of(&e.id, [1, e.dims()[0]], 0);
                scores.extend((0..values.len()).map(|i| values[i] + at_input[i] + at_output[i]));
            }
        });
        scores
    }

    /// Values of the parameters that mask all components but those of the pattern.
    fn masked(&self, part: &dyn Part, pattern: &[bool]) -> BTreeMap<ParamId, Tensor<1>> {
        let (mut values, mut first) = (BTreeMap::new(), 0);
        each_triplet(part, &self.run.adapter, |_, _, triplet| {
            for block in &triplet.e {
                let (id, value) = flat(block);
                let count = value.dims()[0];
                let kept = &pattern[first..first + count];
                first += count;
                if kept.iter().all(|kept| *kept) {
                    continue;
                }
                let mut held = host(value.clone());
                held.iter_mut().zip(kept).filter(|(_, kept)| !**kept).for_each(|(value, _)| *value = 0.0);
                values.insert(id, Tensor::from_data(TensorData::new(held, [count]), &value.device()));
            }
        });
        values
    }
}

/// All but the `count` lowest scores; of equal ones the first are the lowest.
fn all_but_lowest(scores: &[f32], count: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|left, right| scores[*left].total_cmp(&scores[*right]));
    let mut kept = vec![true; scores.len()];
    order.iter().take(count).for_each(|place| kept[*place] = false);
    kept
}

impl Allocator for Masked {
    fn begin_step(&mut self, _: &StepInfo, _: &dyn Part) -> Result<(), HookError> {
        self.grads.clear();
        match (self.restored_total, self.run.total_steps) {
            (Some(before), Some(now)) if before != now => Err(format!(
                "train.steps: the budget of adalora was made for {before} steps, and the run now has {now}; resume it with its own length"
            )
            .into()),
            _ => Ok(()),
        }
    }

    fn loss_term(&self, _: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        Ok(orthogonality(part, &self.run.adapter, self.allocation.orth_weight))
    }

    fn after_clipping(
        &mut self,
        _: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        let mut seen = BTreeMap::new();
        each_triplet(part, &self.run.adapter, |_, _, triplet| {
            for block in triplet.a.iter().chain(&triplet.b) {
                if let Some(grad) = grads.get::<2>(block.id) {
                    let count = grad.shape().num_elements();
                    seen.insert(block.id, grad.reshape([count]));
                }
            }
            for block in &triplet.e {
                seen.extend(grads.get::<1>(block.id).map(|grad| (block.id, grad)));
            }
        });
        self.grads.extend(seen);
        Ok(grads)
    }

    fn end_step(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        let t = self.run.index(step);
        let schedule = self.schedule(model.part());
        if t < schedule.total_steps.saturating_sub(schedule.t_final) {
            self.add_sensitivities(model.part());
        }
        let (budget, due) = schedule.at(t);
        let fixed = t >= schedule.fixed_at();
        if !(due || fixed) {
            return Ok(());
        }
        let pattern = match &self.pattern {
            Some(pattern) if fixed => pattern.clone(),
            _ => {
                let budget = if fixed { schedule.target } else { budget };
                all_but_lowest(&self.scores(model.part()), schedule.initial - budget)
            }
        };
        self.masked |= pattern.contains(&false);
        model.assign(self.masked(model.part(), &pattern));
        self.pattern = fixed.then_some(pattern);
        Ok(())
    }

    fn layer(&self, _: &str, adapter: &Adapter) -> LayerAllocation {
        // At the start all values are 0, and nothing is masked.
        match self.masked {
            true => LayerAllocation::of(adapter),
            false => LayerAllocation { rank: adapter.place().rank, ..LayerAllocation::default() },
        }
    }

    fn record(&self) -> AllocationRecord {
        let mut record = AllocationRecord::default();
        for (id, importance) in &self.importance {
            importance.put(&id.val().to_string(), &mut record);
        }
        if let Some(pattern) = &self.pattern {
            record.put_numbers("pattern", pattern.iter().map(|kept| f64::from(u8::from(*kept))).collect());
        }
        record.put_numbers("masked", vec![f64::from(u8::from(self.masked))]);
        record.put_numbers("total-steps", vec![self.run.total_steps.unwrap_or(0) as f64]);
        record
    }

    fn restore(&mut self, mut record: AllocationRecord) {
        let known = Importance::take_all(&mut record).into_iter();
        self.importance = known.filter_map(|(id, kept)| Some((id.parse::<u64>().ok()?.into(), kept))).collect();
        self.pattern = record.take_numbers("pattern").map(|kept| kept.into_iter().map(|kept| kept != 0.0).collect());
        self.masked = record.take_numbers("masked").is_some_and(|masked| masked.contains(&1.0));
        self.restored_total = record.take_numbers("total-steps").and_then(|total| Some(*total.first()? as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_so_many_are_masked_and_of_equal_ones_the_first() {
        assert_eq!(all_but_lowest(&[1.0, 0.0, 1.0, 2.0, 1.0], 3), [false, false, false, true, true]);
        assert_eq!(all_but_lowest(&[1.0, 0.0], 0), [true, true]);
    }

    #[test]
    fn the_budget_never_rises_and_ends_at_the_target() {
        let schedule =
            BudgetSchedule { initial: 216, target: 72, total_steps: 500, t_init: 50, t_final: 100, delta_t: 7 };
        let budgets: Vec<usize> = (0..500).map(|step| schedule.at(step).0).collect();
        assert!(budgets.windows(2).all(|pair| pair[0] >= pair[1]));
        assert_eq!((budgets[50], budgets[400], budgets[499]), (216, 72, 72));
        assert!(!schedule.at(50).1 && schedule.at(56).1 && !schedule.at(57).1 && schedule.at(401).1);
    }
}
