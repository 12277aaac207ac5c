//! Sparsity shared between layers by their importance ("Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition
//! for Vision Models", SNELLA, arXiv 2510.24037).

use std::collections::BTreeMap;

use burn::module::ParamId;
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
use super::view::LayerAllocation;
use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::site::Place;
use crate::ground::stack::{Adapter, each_adapter};
use crate::structures::Snell;

pub(super) static ENTRY: AllocationEntry = AllocationEntry {
    entry: Entry {
        papers: &[Paper {
            title: "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
            place: "2510.24037",
        }],
        needs: &["the structure snell"],
        options: || OptionList::of(&SnellA::default()),
        ..Entry::plain(
            Kind::Allocation,
            "snella",
            "shares a shrinking number of non-zero entries between the layers by their importance",
        )
    },
    structures: &["snell"],
    read: |options| read::<SnellA>(&ENTRY, options),
};

/// Allocation SNELLA, with the mixture of the structure. A layer's importance is that of its points.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SnellA {
    /// Fraction of zeros at the start.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub initial_sparsity: f64,
    /// Fraction of zeros at the end; not below that of the start.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub target_sparsity: f64,
    /// Steps of a period, the epoch of the authors' runs; a twentieth of the run if empty.
    #[schemars(range(min = 1))]
    pub period: Option<u64>,
    /// Periods before the budget shrinks.
    pub t_init: u64,
    /// Periods with the final budget.
    pub t_final: u64,
    /// Periods between two changes.
    #[schemars(range(min = 1))]
    pub interval: u64,
    /// Decay of the mean of the importance.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub beta1: f64,
    /// Decay of its uncertainty.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub beta2: f64,
}

impl Default for SnellA {
    fn default() -> Self {
        Self {
            initial_sparsity: 0.01,
            target_sparsity: 0.8,
            period: None,
            t_init: 0,
            t_final: 0,
            interval: 1,
            beta1: 0.85,
            beta2: 0.85,
        }
    }
}

/// Number of entries that may be non-zero at the start of a period, from 0, of `periods`, and true if they are shared
/// out again then.
pub fn budget(options: &SnellA, caps: &[u64], period: u64, periods: u64) -> (f64, bool) {
    let total = |sparsity: f64| {
        let sum = caps.iter().map(|cap| (1.0 - sparsity) * *cap as f64).sum::<f64>();
        // A sum that is a whole number but for its rounding must not lose one when it is cut off.
        if (sum - sum.round()).abs() < 1e-9 * sum { sum.round() } else { sum }
    };
    let (first, last) = (total(options.initial_sparsity), total(options.target_sparsity));
    if period <= options.t_init {
        return (first, false);
    }
    if period > periods.saturating_sub(options.t_final) {
        return (last, true);
    }
    let span = periods.saturating_sub(options.t_final + options.t_init) as f64;
    let left = 1.0 - (period - options.t_init) as f64 / span;
    ((last + (first - last) * left.powi(3)).trunc(), period.is_multiple_of(options.interval))
}

/// Largest whole number up to a share, of which scores in f32 leave the last digits open.
fn whole(share: f64) -> f64 {
    (share + (2.5e-7 * share).min(1e-4)).floor()
}

/// Shares a budget of non-zero entries between layers in proportion to their scores, at most `caps` each.
pub fn shared_out(scores: &[f64], budget: f64, caps: &[u64]) -> Vec<u64> {
    let caps: Vec<f64> = caps.iter().map(|cap| *cap as f64).collect();
    let sum: f64 = scores.iter().sum();
    let scores: Vec<f64> = match sum > 0.0 {
        true => scores.iter().map(|score| score / sum).collect(),
        false => vec![1.0 / scores.len() as f64; scores.len()],
    };
    let mut given: Vec<f64> = scores.iter().zip(&caps).map(|(score, cap)| cap.min(whole(budget * score))).collect();
    loop {
        let rest = budget - given.iter().sum::<f64>();
        if rest <= 0.0 {
            break;
        }
        let room: Vec<bool> = given.iter().zip(&caps).map(|(given, cap)| given < cap).collect();
        let of_room = |scores: &[f64]| scores.iter().zip(&room).filter(|(_, room)| **room).map(|(s, _)| s).sum::<f64>();
        let all = of_room(&scores);
        let before = given.clone();
        for place in (0..given.len()).filter(|place| room[*place]) {
            let share = if all > 0.0 { scores[place] / all } else { 0.0 };
            given[place] = caps[place].min(given[place] + rest * share);
        }
        if before == given {
            break;
        }
    }
    given.into_iter().map(|given| whole(given) as u64).collect()
}

/// Importance of every layer: sensitivity times uncertainty of its points.
#[derive(Clone, Debug, Default)]
pub struct SnellaScores {
    /// Importance of the points, by layer and field.
    points: BTreeMap<String, Importance>,
}

impl SnellaScores {
    /// Advances the importance with the gradients of a step and the values after it.
    pub fn advance(&mut self, options: &SnellA, part: &dyn Part, grads: &GradientsParams) {
        each_snell(part, |path, snell| {
            for (field, points) in [("p", &snell.p), ("q", &snell.q)] {
                let Some(grad) = grads.get::<3>(points.id) else { continue };
                let product = (points.val().without_autodiff() * grad).abs();
                let nothing = product.clone().is_nan();
                let count = product.dims().iter().product();
                let sensitivity = product.mask_fill(nothing, 0.0).reshape([count]);
                let device = sensitivity.device();
                let importance = self.points.entry(format!("{path}.{field}"));
                let importance = importance.or_insert_with(|| Importance::new(count, &device));
                importance.add(sensitivity, options.beta1, options.beta2);
            }
        });
    }

    /// Score of every layer, in the order of the module, with sum 1; equal ones if all are 0.
    pub fn layers(&self, part: &dyn Part) -> Vec<f64> {
        let mut scores = Vec::new();
        each_snell(part, |path, _| {
            let mean = |field: &str| {
                let Some(importance) = self.points.get(&format!("{path}.{field}")) else { return 0.0 };
                let values = host(importance.score());
                values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len().max(1) as f64
            };
            scores.push(mean("p") + mean("q"));
        });
        let sum: f64 = scores.iter().sum();
        let count = scores.len() as f64;
        scores.into_iter().map(|score| if sum > 0.0 { score / sum } else { 1.0 / count }).collect()
    }

    /// Shares a budget between the layers of a module: the entries of each, and the values of their sparsities.
    pub fn allocate(&self, part: &dyn Part, budget: f64) -> (Vec<u64>, BTreeMap<ParamId, Tensor<1>>) {
        let caps = caps(part);
        let given = shared_out(&self.layers(part), budget, &caps);
        let mut values = BTreeMap::new();
        let mut places = given.iter().zip(&caps);
        each_snell(part, |_, snell| {
            if let Some((given, cap)) = places.next() {
                let sparsity = (1.0 - *given as f64 / *cap as f64).clamp(0.0, 1.0);
                let device = snell.sparsity.val().without_autodiff().device();
                let stored = TensorData::new(Snell::stored_sparsity(sparsity), [3]);
                values.insert(snell.sparsity.id, Tensor::from_data(stored, &device));
            }
        });
        (given, values)
    }

    fn record(&self) -> AllocationRecord {
        let mut record = AllocationRecord::default();
        self.points.iter().for_each(|(name, importance)| importance.put(name, &mut record));
        record
    }

    fn restore(&mut self, mut record: AllocationRecord) {
        self.points = Importance::take_all(&mut record).into_iter().collect();
    }
}

impl SnellA {
    /// Steps of a period, and the number of periods, in a run of `total` steps.
    fn periods(&self, total: u64) -> (u64, u64) {
        let period = self.period.unwrap_or(total / 20).max(1);
        (period, total.div_ceil(period))
    }
}

impl Allocation for SnellA {
    fn entry(&self) -> &'static AllocationEntry {
        &ENTRY
    }

    fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        if let Some(sparsity) = config.options.get("sparsity") {
            return refused(
                "adapter.options.sparsity",
                sparsity,
                "snella sets the sparsity of each layer; set allocation.options.initial_sparsity and target_sparsity",
            );
        }
        if config.options.get("mode").is_some_and(|mode| mode == "none") {
            return refused("adapter.options.mode", "none", "snella needs a sparsifier: official, paper or hard");
        }
        if config.options.get("mixture").is_some_and(|mixture| mixture == false) {
            return refused("adapter.options.mixture", "false", "snella trains the mixture; remove it");
        }
        Ok(config.with_option("mixture", true).with_option("sparsity", self.initial_sparsity))
    }

    fn check(&self, run: &AllocationRun, layers: &[Place]) -> Result<(), AdapterError> {
        let Self { initial_sparsity, target_sparsity, t_init, t_final, .. } = *self;
        if target_sparsity < initial_sparsity {
            return refused(
                "allocation.options.target_sparsity",
                target_sparsity,
                format!("the schedule ends before it begins: it must be at least initial_sparsity, {initial_sparsity}"),
            );
        }
        let entries: usize = layers.iter().map(|layer| layer.shape[0] * layer.shape[1]).sum();
        let last = (1.0 - target_sparsity) * entries as f64;
        if last < 1.0 {
            return refused(
                "allocation.options.target_sparsity",
                target_sparsity,
                format!("of the {entries} entries of all layers it leaves {last:.3}, less than one; lower it"),
            );
        }
        let Some(total) = run.total_steps else {
            return refused(
                "train.minutes",
                "set",
                "the budget of snella shrinks over a known number of steps; set train.steps instead",
            );
        };
        let (period, periods) = self.periods(total);
        if t_init + t_final >= periods {
            return refused(
                "allocation.options.t_init",
                t_init,
                format!(
                    "with t_final = {t_final} it leaves nothing of the {periods} periods of {period} steps for the budget to shrink; lower one, or allocation.options.period"
                ),
            );
        }
        Ok(())
    }

    fn state_bytes(&self, place: &Place, _micro_batches: u64) -> usize {
        2 * 4 * place.rank * (place.shape[0] + place.shape[1])
    }

    fn allocator(&self, run: &AllocationRun) -> Box<dyn Allocator> {
        let (options, run) = (self.clone(), run.clone());
        Box::new(Sharing { options, run, scores: SnellaScores::default(), seen: GradientsParams::new() })
    }
}

#[derive(Debug)]
struct Sharing {
    options: SnellA,
    run: AllocationRun,
    scores: SnellaScores,
    /// Gradients of the step, until the points are updated.
    seen: GradientsParams,
}

impl Allocator for Sharing {
    fn after_clipping(
        &mut self,
        _: &StepInfo,
        part: &dyn Part,
        grads: GradientsParams,
    ) -> Result<GradientsParams, HookError> {
        self.seen = GradientsParams::new();
        each_snell(part, |_, snell| {
            for id in [snell.p.id, snell.q.id] {
                if let Some(grad) = grads.get::<3>(id) {
                    self.seen.register(id, grad);
                }
            }
        });
        Ok(grads)
    }

    fn after_update(&mut self, _: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        let seen = std::mem::replace(&mut self.seen, GradientsParams::new());
        self.scores.advance(&self.options, model.part(), &seen);
        Ok(())
    }

    fn end_step(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        let Some(total) = self.run.total_steps else { return Ok(()) };
        let (period, periods) = self.options.periods(total);
        let next = self.run.index(step) + 1;
        if next.is_multiple_of(period) && next < total {
            let (budget, changes) = budget(&self.options, &caps(model.part()), next / period, periods);
            if changes {
                let (_, values) = self.scores.allocate(model.part(), budget);
                model.assign(values);
            }
        }
        Ok(())
    }

    fn layer(&self, _path: &str, adapter: &Adapter) -> LayerAllocation {
        let mut layer = LayerAllocation::of(adapter);
        if let Some(snell) = adapter.structure.downcast_ref::<Snell>() {
            let sparsity = snell.sparsity();
            let [d_in, d_out] = adapter.place().shape;
            layer.figures.insert("sparsity", sparsity);
            layer.figures.insert("entries", ((1.0 - sparsity) * (d_in * d_out - 1) as f64).ceil());
        }
        layer
    }

    fn record(&self) -> AllocationRecord {
        self.scores.record()
    }

    fn restore(&mut self, record: AllocationRecord) {
        self.scores.restore(record);
    }
}

/// Number of entries of the layers, in the order of the module.
fn caps(part: &dyn Part) -> Vec<u64> {
    let mut caps = Vec::new();
    each_snell(part, |_, snell| caps.push((snell.p.dims()[1] * snell.q.dims()[1]) as u64));
    caps
}

/// Visits the layers of the structure with their paths.
fn each_snell(part: &dyn Part, mut see: impl FnMut(&str, &Snell)) {
    each_adapter(part, |path, stack| {
        for adapter in &stack.stack {
            if let Some(snell) = adapter.structure.downcast_ref::<Snell>() {
                see(path, snell);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_used_up_unless_all_layers_are_full() {
        let cases: [(&[f64], f64, &[u64]); 5] = [
            (&[0.5, 0.3, 0.2], 60.0, &[100, 100, 100]),
            (&[0.9, 0.05, 0.05], 120.0, &[50, 100, 100]),
            (&[0.0, 0.0], 11.0, &[10, 10]),
            (&[1.0, 0.0], 15.0, &[10, 10]),
            (&[0.2, 0.8], 1e3, &[10, 20]),
        ];
        for (scores, budget, caps) in cases {
            let given = shared_out(scores, budget, caps);
            assert!(given.iter().zip(caps).all(|(given, cap)| given <= cap), "{given:?}");
            let rest = budget - given.iter().sum::<u64>() as f64;
            let stuck = given.iter().zip(caps).zip(scores).all(|((given, cap), score)| given == cap || *score == 0.0);
            assert!(rest >= 0.0 && (rest < given.len() as f64 || stuck), "{given:?} of {budget}");
        }
    }

    #[test]
    fn the_budget_shrinks_to_its_target() {
        let options = SnellA { t_init: 1, t_final: 2, interval: 2, ..SnellA::default() };
        let budgets: Vec<(f64, bool)> = (0..10).map(|period| budget(&options, &[100, 300], period, 10)).collect();
        assert_eq!(budgets[..2], [(396.0, false), (396.0, false)]);
        assert!(budgets.windows(2).all(|pair| pair[1].0 <= pair[0].0), "{budgets:?}");
        assert_eq!([budgets[2].1, budgets[3].1], [true, false]);
        assert!((budgets[9].0 - 80.0).abs() < 1e-9 && budgets[9].1);
    }
}
