//! Search for the layers that are worth an adapter ("DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via
//! Differential Low-Rank Matrix Adaptation", arXiv 2502.08905). Our reading of the abstract; no code of the authors was
//! found.
//!
//! Every layer has LoRA behind a weight that follows from a logit. Logits learn from held-out data, factors from the
//! training data; then the strongest layers keep an adapter of their own, and the others share one for each type.

mod allocator;
mod grid;
mod options;
mod search;
mod sharing;

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper};

use super::definition::{Allocation, AllocationEntry, AllocationRun, Allocator, read, refused};
use crate::ground::error::AdapterError;
use crate::ground::site::Place;

pub use allocator::SELECTED;
pub use grid::{LayerGrid, layer_weights, logit_gradients, selected_layers};
pub use options::{DiffoRa, SearchOrder, SearchRelaxation, SearchScope, Sharing};
pub use search::{DifforaSearch, architecture_gradients};
pub use sharing::SharedPairs;

pub(super) static ENTRY: AllocationEntry = AllocationEntry {
    entry: Entry {
        papers: &[Paper {
            title: "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation",
            place: "2502.08905",
        }],
        needs: &["the structure diffora"],
        refuses: &["the per-layer backward mode", "runs without a number of steps"],
        options: || OptionList::of(&DiffoRa::default()),
        ..Entry::plain(
            Kind::Allocation,
            "diffora",
            "searches for the layers that are worth an adapter; our reading of a paper without code",
        )
    },
    structures: &["diffora"],
    read: |options| read::<DiffoRa>(&ENTRY, options),
};

impl Allocation for DiffoRa {
    fn entry(&self) -> &'static AllocationEntry {
        &ENTRY
    }

    fn check(&self, run: &AllocationRun, layers: &[Place]) -> Result<(), AdapterError> {
        if run.stage == 0 && run.total_steps.is_none() {
            return refused(
                "train.minutes",
                "set",
                "diffora selects layers after a number of steps, which a time limit leaves open; set train.steps instead",
            );
        }
        if self.sharing == Sharing::Pair && self.rho < 1.0 {
            SharedPairs::check(layers.iter().map(|layer| (layer.path.as_str(), layer.shape)))?;
        }
        Ok(())
    }

    /// The search, and the training of what it selected.
    fn stages(&self, steps: Option<u64>) -> Result<Vec<Option<u64>>, AdapterError> {
        let Some(steps) = steps else { return Ok(vec![None; 2]) };
        let search = self.steps_of_search(steps);
        if search >= steps {
            return refused(
                "allocation.options.search_steps",
                search,
                format!("the search takes all {steps} steps of the run; lower it, or raise train.steps"),
            );
        }
        Ok(vec![Some(search), Some(steps - search)])
    }

    fn search_fraction(&self) -> Option<f64> {
        Some(self.val_fraction)
    }

    fn state_bytes(&self, _place: &Place, _micro_batches: u64) -> usize {
        // Two moments of the logit.
        8
    }

    fn allocator(&self, run: &AllocationRun) -> Box<dyn Allocator> {
        Box::new(allocator::Selecting::new(self.clone(), run.clone()))
    }
}
