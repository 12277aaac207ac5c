//! Memory of a run, estimated before it starts.
//!
//! [`Forecaster`] counts the bytes of a run from its configuration alone: the exact sizes of weights, gradients and
//! optimizer state, and the memory that the CPU backend's operations keep and need temporarily. [`candidates`] varies
//! the unset settings, and [`choose`] selects the cheapest candidate within a limit.

mod forecast;
mod inventory;
mod parts;
mod search;
mod work;

pub use forecast::{Forecast, Forecaster};
pub use inventory::Inventory;
pub use parts::{ModelBytes, SegmentBytes};
pub use search::{Candidate, Freedom, candidates, choose, limit, mode};
pub use work::{operations, speed};
