//! Growth of the layers in the course of a run.

use std::collections::BTreeMap;

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::scores_on;
use lowrank_optim::{HookError, Part, StepInfo};

use super::options::IncreLora;
use crate::allocation::definition::{AllocationRun, Allocator};
use crate::allocation::importance::Importance;
use crate::allocation::model::{AllocatedModel, Rebuild};
use crate::allocation::record::AllocationRecord;
use crate::allocation::triplets::{each_triplet, orthogonality};
use crate::allocation::view::LayerAllocation;
use crate::ground::any::AnyStructure;
use crate::ground::error::AdapterError;
use crate::ground::site::Size;
use crate::ground::stack::Adapter;
use crate::structures::{Triplet, TripletOptions};

/// Value of the components of a reserve that learns in advance: almost none.
const RESERVE: f32 = 1e-5;

/// The run of an allocation: which layers grow, and when their components were born.
#[derive(Debug)]
pub(super) struct Growing {
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
    pub(super) fn new(allocation: IncreLora, run: AllocationRun) -> Self {
        Self { allocation, run, importance: None, born: BTreeMap::new(), before: BTreeMap::new(), restored_total: None }
    }

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
