//! IncreLoRA: the layers that matter most get components in the course of the run ("IncreLoRA: Incremental Parameter
//! Allocation Method for Parameter-Efficient Fine-tuning", arXiv 2308.12043).

use std::collections::BTreeMap;

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::scores_on;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use lowrank_optim::{HookError, Part, StepInfo};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Allocation, AllocationEntry, AllocationRun, Allocator, read, refused};
use super::importance::Importance;
use super::model::{AllocatedModel, Rebuild};
use super::record::AllocationRecord;
use super::triplets::{each_triplet, orthogonality};
use super::view::LayerAllocation;
use crate::ground::any::AnyStructure;
use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Size};
use crate::ground::stack::Adapter;
use crate::structures::{Triplet, TripletOptions};

pub(super) static ENTRY: AllocationEntry = AllocationEntry {
    entry: Entry {
        papers: &[Paper {
            title: "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
            place: "2308.12043",
        }],
        memory: "3 add_rank (d_in + d_out) of a reserve; d_in d_out with several micro-batches",
        needs: &["the structure triplet", "a known number of steps", "the optimizer adamw"],
        refuses: &["train.backward = per-layer", "GPUs"],
        options: || OptionList::of(&IncreLora::default()),
        ..Entry::plain(
            Kind::Allocation,
            "increlora",
            "starts with rank 1 and gives more components to the layers that matter most",
        )
    },
    structures: &["triplet"],
    read: |options| read::<IncreLora>(&ENTRY, options),
};

/// Value of the components of a reserve that learns in advance: almost none.
const RESERVE: f32 = 1e-5;

/// Allocation IncreLoRA. The rank of the adapter is that at the start of each layer, 1 when not given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IncreLora {
    /// Average rank of the layers at the end.
    #[schemars(range(min = 1, max = 131_072))]
    pub target_rank: usize,
    /// Sum of the ranks of all layers at the end, instead of an average.
    #[schemars(range(min = 1))]
    pub total_rank: Option<usize>,
    /// Components that a layer gets at a time.
    #[schemars(range(min = 1, max = 131_072))]
    pub add_rank: usize,
    /// Layers that get components at a time.
    #[schemars(range(min = 1))]
    pub top_h: usize,
    /// Steps before the first growth.
    pub init_warmup: u64,
    /// Steps between growths.
    #[schemars(range(min = 1))]
    pub increment_interval: u64,
    /// Smoothing of the scores.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub beta_1: f64,
    /// Smoothing of their deviations.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0))]
    pub beta_2: f64,
    /// Weight gamma of the distance of the factors from being orthonormal.
    #[schemars(range(min = 0.0, max = 1e9))]
    pub orth_weight: f64,
    /// Train the components that a layer gets next before it has them.
    pub advance_learn: bool,
    /// New components have the learning-rate schedule of a run that starts with them.
    pub restart_warmup: bool,
}

impl Default for IncreLora {
    fn default() -> Self {
        Self {
            target_rank: 2,
            total_rank: None,
            add_rank: 1,
            top_h: 2,
            init_warmup: 100,
            increment_interval: 100,
            beta_1: 0.85,
            beta_2: 0.85,
            orth_weight: 0.1,
            advance_learn: true,
            restart_warmup: true,
        }
    }
}

impl IncreLora {
    fn target(&self, layers: usize) -> usize {
        self.total_rank.unwrap_or(self.target_rank * layers)
    }

    /// Returns true if layers grow at a step, counted from 0.
    fn grows_at(&self, step: u64) -> bool {
        step > self.init_warmup && step.is_multiple_of(self.increment_interval)
    }

    /// Components that the growths of a run add at most.
    fn reach(&self, total_steps: u64, layers: usize) -> usize {
        let last = total_steps.saturating_sub(1) / self.increment_interval;
        let events = last.saturating_sub(self.init_warmup / self.increment_interval);
        usize::try_from(events)
            .unwrap_or(usize::MAX)
            .saturating_mul(self.top_h.min(layers))
            .saturating_mul(self.add_rank)
    }
}

impl Allocation for IncreLora {
    fn entry(&self) -> &'static AllocationEntry {
        &ENTRY
    }

    fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        let config = AdapterConfig { rank: config.rank.or(Some(1)), ..config };
        Ok(match self.advance_learn {
            true => config,
            false => config.with_option("train_reserve", false),
        })
    }

    fn check(&self, run: &AllocationRun, layers: &[Place]) -> Result<(), AdapterError> {
        let Some(total) = run.total_steps else {
            return refused(
                "allocation.name",
                "increlora",
                "its growth follows the steps of the run: set train.steps or train.epochs, and train.minutes to 0",
            );
        };
        for (key, value) in [
            ("add_rank", self.add_rank as u64),
            ("top_h", self.top_h as u64),
            ("increment_interval", self.increment_interval),
        ] {
            if value == 0 {
                return refused(&format!("allocation.options.{key}"), value, "it must be at least 1");
            }
        }
        let initial: usize = layers.iter().map(|layer| layer.rank).sum();
        let target = self.target(layers.len());
        if target < initial {
            let (key, value) = match self.total_rank {
                Some(total) => ("allocation.options.total_rank", total),
                None => ("allocation.options.target_rank", self.target_rank),
            };
            return refused(
                key,
                value,
                format!(
                    "the budget of {target} components is below the {initial} that {} layers start with; raise it, or lower adapter.rank",
                    layers.len()
                ),
            );
        }
        if target > initial && self.reach(total, layers.len()) == 0 {
            return refused(
                "allocation.options.init_warmup",
                self.init_warmup,
                format!(
                    "the run ends after {total} steps, before the first growth at allocation.options.increment_interval = {}; lower one of them",
                    self.increment_interval
                ),
            );
        }
        Ok(())
    }

    fn check_optimizer(&self, method: &str) -> Result<(), AdapterError> {
        match method {
            "adamw" => Ok(()),
            other => Err(AdapterError::Refused(format!(
                "optimizer.name = {other}: not supported with allocation increlora, whose new components have AdamW with moments of their own; set it to adamw"
            ))),
        }
    }

    fn warnings(&self, run: &AllocationRun, layers: &[Place]) -> Vec<String> {
        let initial: usize = layers.iter().map(|layer| layer.rank).sum();
        let missing = self.target(layers.len()).saturating_sub(initial);
        let mut warnings = Vec::new();
        if !missing.is_multiple_of(self.add_rank) {
            warnings.push(format!(
                "increlora adds {} components at a time: {} of the budget stay unused",
                self.add_rank,
                missing % self.add_rank
            ));
        }
        let reach = self.reach(run.total_steps.unwrap_or(0), layers.len());
        if reach + self.add_rank <= missing {
            warnings.push(format!(
                "increlora cannot reach its budget: {missing} components are missing, and the growths of {} steps add {reach}; raise allocation.options.top_h or lower allocation.options.increment_interval",
                run.total_steps.unwrap_or(0)
            ));
        }
        if run.micro_batches > 1 {
            let bytes: usize = layers.iter().map(|layer| 4 * layer.shape[0] * layer.shape[1]).sum();
            warnings.push(format!(
                "increlora with train.accumulation = {}: the gradients of the updates are kept between micro-batches, {bytes} bytes in all; train.accumulation = 1 needs none of them",
                run.micro_batches
            ));
        }
        warnings
    }

    fn state_bytes(&self, place: &Place, micro_batches: u64) -> usize {
        if micro_batches > 1 { 4 * place.shape[0] * place.shape[1] } else { 0 }
    }

    fn largest_rank(&self, layers: usize) -> Option<usize> {
        Some(self.target(layers).div_ceil(layers.max(1)) + self.add_rank)
    }

    fn allocator(&self, run: &AllocationRun) -> Box<dyn Allocator> {
        Box::new(Growing {
            allocation: self.clone(),
            run: run.clone(),
            importance: None,
            born: BTreeMap::new(),
            before: BTreeMap::new(),
            restored_total: None,
        })
    }
}

#[derive(Debug)]
struct Growing {
    allocation: IncreLora,
    run: AllocationRun,
    /// Importance of the layers, in their order.
    importance: Option<Importance>,
    /// Step at which parameters were appended, or began to be trained, counted from 0.
    born: BTreeMap<ParamId, u64>,
    /// Values of those parameters before the optimizer's step.
    before: BTreeMap<ParamId, Tensor<1>>,
    /// Steps of the run that a restored state belongs to.
    restored_total: Option<u64>,
}

/// A layer as the allocation sees it.
struct Layer {
    path: String,
    rank: usize,
    has_reserve: bool,
    score: f64,
}

impl Growing {
    fn layers(&self, part: &dyn Part) -> Vec<Layer> {
        let mut layers = Vec::new();
        each_triplet(part, &self.run.adapter, |path, adapter, triplet| {
            let [d_in, d_out] = adapter.place().shape;
            layers.push(Layer {
                path: path.to_string(),
                rank: triplet.rank(),
                has_reserve: triplet.active_blocks() < triplet.blocks().len(),
                score: triplet.importance() / ((d_in * d_out) as f64).sqrt(),
            });
        });
        layers
    }

    /// Appends a reserve to the layers of these paths, after activating the one that they have.
    fn grow(
        &mut self,
        t: u64,
        model: &mut dyn AllocatedModel,
        paths: &[String],
        activate: bool,
    ) -> Result<(), HookError> {
        let IncreLora { add_rank, advance_learn, .. } = self.allocation;
        let (value, options) =
            (if advance_learn { RESERVE } else { 0.0 }, TripletOptions { train_reserve: advance_learn });
        model.rebuild(&mut |path, adapter| {
            let Size { rank, scale } = adapter.place().size();
            let rebuilt = |size| Rebuild {
                size,
                make: Box::new(move |structure: &AnyStructure, site| {
                    let Some(triplet) = structure.downcast_ref::<Triplet>() else {
                        return Err(AdapterError::Refused(format!("{} is no triplet", site.place.path)));
                    };
                    let triplet = if activate { triplet.activated(site) } else { triplet.clone() };
                    Ok(AnyStructure::new(triplet.with_reserve(add_rank, value, options, site)?))
                }),
            };
            paths.iter().any(|chosen| chosen == path).then(|| match activate {
                // The numerator of the scale stays what it is.
                true => {
                    rebuilt(Size { rank: rank + add_rank, scale: adapter.place().alpha / (rank + add_rank) as f64 })
                }
                false => rebuilt(Size { rank, scale }),
            })
        })?;
        // Factors count from when they are first trained, values from their activation.
        let born = &mut self.born;
        each_triplet(model.part(), &self.run.adapter, |path, _, triplet| {
            if !paths.iter().any(|chosen| chosen == path) {
                return;
            }
            let (active, reserve) = (triplet.active_blocks(), triplet.blocks().len() - 1);
            let factors = |block: usize| [triplet.a[block].id, triplet.b[block].id];
            if activate {
                born.insert(triplet.e[active - 1].id, t);
            }
            match (advance_learn, activate) {
                (true, _) => born.extend(factors(reserve).map(|id| (id, t))),
                (false, true) => born.extend(factors(active - 1).map(|id| (id, t))),
                (false, false) => {}
            }
        });
        Ok(())
    }

    /// The layers that grow: those of the largest importance, of equal ones the first.
    fn chosen(&self, layers: &[Layer], total: usize, target: usize) -> Vec<String> {
        let count = self.allocation.top_h.min((target - total) / self.allocation.add_rank);
        let importance = self.importance.as_ref().map(|importance| host(importance.score())).unwrap_or_default();
        let mut order: Vec<usize> = (0..layers.len()).collect();
        order.sort_by(|left, right| importance[*right].total_cmp(&importance[*left]));
        order.into_iter().take(count).map(|place| layers[place].path.clone()).collect()
    }

    /// Learning rate of parameters that were born at a step.
    fn rate(&self, t: u64, born: u64) -> f64 {
        let total = self.run.total_steps.map(|total| total.saturating_sub(born + 1));
        self.run.rates.rate(t - (born + 1), total)
    }
}

/// Values of a parameter without its graph, flat.
fn flat<const D: usize>(param: &Param<Tensor<D>>) -> Tensor<1> {
    let value = param.val().without_autodiff();
    let count = value.shape().num_elements();
    value.reshape([count])
}

/// Visits the values of parameters, flat, with their ids.
fn each_value(part: &dyn Part, adapter: &str, mut see: impl FnMut(ParamId, Tensor<1>)) {
    each_triplet(part, adapter, |_, _, triplet| {
        triplet.a.iter().chain(&triplet.b).for_each(|block| see(block.id, flat(block)));
        triplet.e.iter().for_each(|block| see(block.id, flat(block)));
    });
}

impl Allocator for Growing {
    fn needs_all_gradients(&self) -> Option<String> {
        Some("it compares the scores of all layers before any of them is updated".into())
    }

    fn begin_step(&mut self, _: &StepInfo, part: &dyn Part) -> Result<(), HookError> {
        if let (Some(before), Some(now)) = (self.restored_total, self.run.total_steps)
            && before != now
        {
            return Err(format!(
                "train.steps: the growth of increlora was planned for {before} steps, and the run now has {now}; resume it with its own length"
            )
            .into());
        }
        let layers = self.layers(part);
        let total: usize = layers.iter().map(|layer| layer.rank).sum();
        let passes = if total < self.allocation.target(layers.len()) { self.run.micro_batches } else { 0 };
        let mut elsewhere = false;
        each_triplet(part, &self.run.adapter, |_, _, triplet| {
            elsewhere |= !scores_on(&triplet.a[0].val().device());
            triplet.score().collect(passes);
        });
        match elsewhere && passes > 0 {
            true => {
                Err("allocation.name = increlora: its scores are collected on the CPU alone; set train.device to cpu"
                    .into())
            }
            false => Ok(()),
        }
    }

    fn loss_term(&self, _: &StepInfo, part: &dyn Part) -> Result<Option<Tensor<1>>, HookError> {
        Ok(orthogonality(part, &self.run.adapter, self.allocation.orth_weight))
    }

    fn before_update(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        let t = self.run.index(step);
        let layers = self.layers(model.part());
        let without: Vec<String> =
            layers.iter().filter(|layer| !layer.has_reserve).map(|layer| layer.path.clone()).collect();
        if !without.is_empty() {
            self.grow(t, model, &without, false)?;
        }
        let (mut total, target) = (layers.iter().map(|layer| layer.rank).sum(), self.allocation.target(layers.len()));
        if total < target {
            let scores: Vec<f32> = layers.iter().map(|layer| layer.score as f32).collect();
            let scores = Tensor::from_data(TensorData::new(scores, [layers.len()]), &Device::default());
            let known = self.importance.get_or_insert_with(|| Importance::new(layers.len(), &Device::default()));
            known.add(scores, self.allocation.beta_1, self.allocation.beta_2);
            if self.allocation.grows_at(t) {
                let chosen = self.chosen(&layers, total, target);
                total += chosen.len() * self.allocation.add_rank;
                self.grow(t, model, &chosen, true)?;
            }
        }
        if total == target {
            let mut closed = BTreeMap::new();
            each_triplet(model.part(), &self.run.adapter, |_, _, triplet| {
                for block in &triplet.e[triplet.active_blocks()..] {
                    closed.insert(block.id, flat(block).zeros_like());
                }
            });
            model.assign(closed);
        }
        if self.allocation.restart_warmup {
            let (born, before) = (&self.born, &mut self.before);
            each_value(model.part(), &self.run.adapter, |id, value| {
                if born.get(&id).is_some_and(|born| *born < t) {
                    before.insert(id, value);
                }
            });
        }
        Ok(())
    }

    fn after_update(&mut self, step: &StepInfo, model: &mut dyn AllocatedModel) -> Result<(), HookError> {
        let t = self.run.index(step);
        let mut values = BTreeMap::new();
        let before = std::mem::take(&mut self.before);
        let mut unreachable_rate = None;
        each_value(model.part(), &self.run.adapter, |id, after| {
            let (Some(before), Some(born)) = (before.get(&id), self.born.get(&id)) else { return };
            let rate = self.rate(t, *born);
            if rate == step.lr {
                return;
            }
            if step.lr == 0.0 {
                unreachable_rate = Some(rate);
                return;
            }
            // An update is proportional to its learning rate.
            let value = match rate == 0.0 {
                true => before.clone(),
                false => before.clone() + (after - before.clone()).mul_scalar(rate / step.lr),
            };
            values.insert(id, value);
        });
        model.assign(values);
        match unreachable_rate {
            Some(rate) => Err(format!(
                "step {}: new components of increlora have the learning rate {rate:e}, and that of the step is 0; set schedule.final_fraction above 0, or allocation.options.restart_warmup to false",
                step.step
            )
            .into()),
            None => Ok(()),
        }
    }

    fn layer(&self, _: &str, adapter: &Adapter) -> LayerAllocation {
        LayerAllocation { rank: adapter.place().rank, ..LayerAllocation::default() }
    }

    fn record(&self) -> AllocationRecord {
        let mut record = AllocationRecord::default();
        if let Some(importance) = &self.importance {
            importance.put("layers", &mut record);
        }
        for (id, born) in &self.born {
            record.put_numbers(format!("born.{}", id.val()), vec![*born as f64]);
        }
        record.put_numbers("total-steps", vec![self.run.total_steps.unwrap_or(0) as f64]);
        record
    }

    fn restore(&mut self, mut record: AllocationRecord) {
        self.importance = Importance::take_all(&mut record).pop().map(|(_, kept)| kept);
        let born = record.take_all("born.").into_iter().filter_map(|(id, step)| {
            let step: Vec<f64> = step.try_into_vec().ok()?;
            Some((id.parse::<u64>().ok()?.into(), *step.first()? as u64))
        });
        self.born = born.collect();
        self.restored_total = record.take_numbers("total-steps").and_then(|total| Some(*total.first()? as u64));
    }
}
