//! What a run will take, before it begins.
//!
//! [`Forecaster`] counts the bytes of a run from its configuration alone: exactly what weights, gradients and optimizer state take, and what the CPU
//! backend's operations keep and need on the way. [`candidates`] varies what is free, and [`choose`] takes what fits a budget and changes least.

mod forecast;
mod inventory;
mod parts;
mod search;

pub use forecast::{Forecast, Forecaster};
pub use inventory::Inventory;
pub use parts::{ModelBytes, SegmentBytes};
pub use search::{Candidate, Freedom, candidates, choose, limit, mode};
