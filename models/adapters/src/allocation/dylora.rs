//! DyLoRA: a rank is drawn for every step, so that every truncation of the adapter works ("DyLoRA: Parameter Efficient
//! Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation", arXiv 2210.07558).

use burn::module::{Param, ParamId};
use burn::tensor::Tensor;
use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};
use lowrank_optim::{HookError, Part, StepInfo, key_of};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Allocation, AllocationEntry, AllocationRun, Allocator, read, refused};
use crate::ground::error::AdapterError;
use crate::ground::site::Place;
use crate::ground::stack::each_adapter;
use crate::structures::{Nested, RANK_OF_PASS};

pub(super) static ENTRY: AllocationEntry = AllocationEntry {
    entry: Entry {
        papers: &[Paper {
            title: "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
            place: "2210.07558",
        }],
        needs: &["the structure nested"],
        options: || OptionList::of(&DyLora::default()),
        ..Entry::plain(
            Kind::Allocation,
            "dylora",
            "draws one rank a step for all layers; each rank up to the largest can be used afterwards",
        )
    },
    structures: &["nested"],
    read: |options| read::<DyLora>(&ENTRY, options),
};

/// Allocation DyLoRA. Which components of the rank are trained is an option of the structure
/// ([`NestedOptions::update`](crate::NestedOptions::update)).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DyLora {
    /// Smallest rank that is drawn; 1 when not given.
    #[schemars(range(min = 1, max = 131_072))]
    pub min_rank: Option<usize>,
    /// Weight of each rank from 1 to the adapter's, in proportion to its probability; empty: all ranks from `min_rank` on alike.
    #[schemars(inner(range(min = 0.0)))]
    pub weights: Vec<f64>,
}

impl Allocation for DyLora {
    fn entry(&self) -> &'static AllocationEntry {
        &ENTRY
    }

    fn check(&self, _run: &AllocationRun, layers: &[Place]) -> Result<(), AdapterError> {
        let Some(first) = layers.first() else { return Ok(()) };
        if let Some(other) = layers.iter().find(|layer| layer.rank != first.rank) {
            return refused(
                "adapter.rank_pattern",
                format!("{}={}", other.path, other.rank),
                format!("dylora draws one rank for all layers, and {} has {}; remove it", first.path, first.rank),
            );
        }
        let (rank, least) = (first.rank, self.min_rank.unwrap_or(1));
        if least == 0 || least > rank {
            return refused(
                "allocation.options.min_rank",
                least,
                format!("it must be from 1 to the adapter's rank, {rank}"),
            );
        }
        let weights = &self.weights;
        if weights.is_empty() {
            return Ok(());
        }
        let shown = format!("{weights:?}");
        if weights.len() != rank {
            return refused(
                "allocation.options.weights",
                shown,
                format!("it must have one weight for each rank from 1 to {rank}, not {}", weights.len()),
            );
        }
        if weights.iter().any(|weight| !(weight.is_finite() && *weight >= 0.0)) {
            return refused("allocation.options.weights", shown, "a weight must be 0 or greater");
        }
        if weights[least - 1..].iter().sum::<f64>() <= 0.0 {
            return refused(
                "allocation.options.weights",
                shown,
                format!("the sum of those from rank {least} on must be above 0"),
            );
        }
        Ok(())
    }

    fn allocator(&self, run: &AllocationRun) -> Box<dyn Allocator> {
        Box::new(Drawn { allocation: self.clone(), run: run.clone(), frozen: Vec::new() })
    }
}

impl DyLora {
    /// The rank of a step, counted from 0, of adapters of rank `largest`; a function of seed and step alone.
    pub fn rank(&self, largest: usize, seed: u64, step: u64) -> usize {
        let least = self.min_rank.unwrap_or(1).min(largest.max(1));
        let mut random = StdRng::seed_from_u64(seed ^ key_of("dylora") ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if self.weights.is_empty() {
            return random.random_range(least..=largest.max(least));
        }
        let all: f64 = self.weights[least - 1..].iter().sum();
        let mut left = random.random::<f64>() * all;
        let drawn = (least..=self.weights.len()).find(|rank| {
            left -= self.weights[rank - 1];
            left < 0.0
        });
        // Rounding may leave a rest: then it is the last rank with a weight.
        let last = || self.weights.iter().rposition(|weight| *weight > 0.0).map_or(least, |place| place + 1);
        drawn.unwrap_or_else(last)
    }
}

#[derive(Debug)]
struct Drawn {
    allocation: DyLora,
    run: AllocationRun,
    frozen: Vec<ParamId>,
}

impl Allocator for Drawn {
    fn begin_step(&mut self, step: &StepInfo, part: &dyn Part) -> Result<(), HookError> {
        let (allocation, run) = (&self.allocation, &self.run);
        let mut frozen = Vec::new();
        each_adapter(part, |_, stack| {
            for adapter in stack.stack.iter().filter(|adapter| adapter.control().name() == run.adapter) {
                let rank = allocation.rank(adapter.place().rank, run.seed, step.step - 1);
                adapter.control().set_values([(RANK_OF_PASS.to_string(), rank as f64)].into());
                let Some(nested) = adapter.structure.downcast_ref::<Nested>().filter(|nested| nested.is_strict())
                else {
                    continue;
                };
                let others = |blocks: &[Param<Tensor<2>>]| {
                    let others = blocks.iter().enumerate().filter(|(component, _)| component + 1 != rank);
                    others.map(|(_, block)| block.id).collect::<Vec<_>>()
                };
                frozen.extend([&nested.a, &nested.b].into_iter().flat_map(|blocks| others(blocks)));
            }
        });
        self.frozen = frozen;
        Ok(())
    }

    fn frozen(&self) -> &[ParamId] {
        &self.frozen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_drawn_alike_or_by_weight_and_follow_from_the_seed() {
        let counts = |allocation: &DyLora| {
            let mut counts = [0usize; 5];
            (0..20_000).for_each(|step| counts[allocation.rank(4, 7, step)] += 1);
            counts
        };
        let uniform = counts(&DyLora::default());
        assert!(uniform[1..].iter().all(|count| (4750..5250).contains(count)), "{uniform:?}");
        let from_three = counts(&DyLora { min_rank: Some(3), ..DyLora::default() });
        assert_eq!(from_three[..3], [0, 0, 0]);
        let weighted = counts(&DyLora { weights: vec![1.0, 0.0, 3.0, 0.0], ..DyLora::default() });
        assert!(weighted[2] + weighted[4] == 0 && (4750..5250).contains(&weighted[1]), "{weighted:?}");
        let draws = |seed| (0..50).map(|step| DyLora::default().rank(8, seed, step)).collect::<Vec<_>>();
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }
}
