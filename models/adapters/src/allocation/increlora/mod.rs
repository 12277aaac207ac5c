//! IncreLoRA: the layers that matter most get components in the course of the run ("IncreLoRA: Incremental Parameter
//! Allocation Method for Parameter-Efficient Fine-tuning", arXiv 2308.12043).

mod growing;
mod options;

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};

use super::definition::{Allocation, AllocationEntry, AllocationRun, Allocator, read, refused};
use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::site::Place;
use growing::Growing;

pub use options::IncreLora;

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

    fn needs_one_process(&self) -> Option<String> {
        Some("it collects the scores of the updates in the backward passes of all micro-batches".into())
    }

    fn state_bytes(&self, place: &Place, micro_batches: u64) -> usize {
        if micro_batches > 1 { 4 * place.shape[0] * place.shape[1] } else { 0 }
    }

    fn largest_rank(&self, layers: usize) -> Option<usize> {
        Some(self.target(layers).div_ceil(layers.max(1)) + self.add_rank)
    }

    fn allocator(&self, run: &AllocationRun) -> Box<dyn Allocator> {
        Box::new(Growing::new(self.clone(), run.clone()))
    }
}
