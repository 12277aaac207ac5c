//! Allocations: how ranks, bits and modules are distributed over the layers while an adapter is trained. Each has a file
//! of its own.
//!
//! A training loop calls the allocation in this order:
//!
//! ```text
//! allocation.prepared(config)      the adapter's configuration as the allocation needs it, or why not
//! allocation.check(&run, &places)  budgets and schedules against the layers and the length of the run
//! allocation.check_optimizer(name) why this optimizer is not supported
//! Attach::new(config).to(model)
//! AllocationHook::new(..)          a hook of the trainer, or of a loop of your own; its view reports ranks by layer
//! ```
//!
//! To add an allocation, write its file and a line in [`ALLOCATIONS`].

mod adalora;
mod bayesian;
mod definition;
mod diffora;
mod dylora;
mod hook;
mod importance;
mod increlora;
mod list;
mod model;
mod record;
mod snella;
mod sora;
mod triplets;
mod values;
mod view;

pub use adalora::{AdaLora, BudgetSchedule};
pub use bayesian::Bayesian;
pub use definition::{Allocation, AllocationEntry, AllocationRun, Allocator, Rates};
pub use diffora::{
    DiffoRa, DifforaSearch, LayerGrid, SELECTED, SearchOrder, SearchRelaxation, SearchScope, SharedPairs, Sharing,
    architecture_gradients, layer_weights, logit_gradients, selected_layers,
};
pub use dylora::DyLora;
pub use hook::AllocationHook;
pub use importance::Importance;
pub use increlora::IncreLora;
pub use list::ALLOCATIONS;
pub use model::{AllocatedModel, Rebuild};
pub use record::AllocationRecord;
pub use snella::{SnellA, SnellaScores, budget, shared_out};
pub use sora::{Prox, SoRa, SparsifyingSchedule, ThresholdMode, official_prox, soft_prox, thresholds};
pub use view::{AllocationView, LayerAllocation};
