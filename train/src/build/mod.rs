//! Parts of a run built from its configuration, one file per section. The planner uses the same code, so that it counts
//! what a run would build.

mod adapter;
mod allocation;
mod architecture;
mod data;
mod error;
mod limits;
mod listener;
mod model;
mod optimizer;
mod schedule;
mod size;
mod storage;
mod vision;
mod warnings;

pub use adapter::{adapter, adapter_folder, names_adapter_folder, rule};
pub use allocation::{allocation, allocation_hook};
pub use architecture::{Architecture, HeldOut, Scores, StageData};
pub use data::{held_out, prepare_data, prepare_options, source};
pub use error::BuildError;
pub use limits::{BEYOND_ANY_MACHINE, check_length, check_sizes, usual_length};
pub use listener::Listener;
pub use model::{model_config, model_folder, set_usual_layer_rank};
pub use optimizer::{Optimizer, optimizer, optimizer_options, parameter_states, usual_rank};
pub use schedule::schedule;
pub use size::Size;
pub use storage::matrix_storage;
pub use vision::{augment, check_text, check_vision, is_clip, is_vision, vit_config};
pub use warnings::warnings;
