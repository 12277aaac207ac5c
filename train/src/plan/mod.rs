//! Memory of a run, estimated before it starts.
//!
//! [`Forecaster`] counts the bytes of a run from its configuration alone: the exact sizes of weights, gradients and
//! optimizer state, and the memory that the CPU backend's operations keep and need temporarily. [`candidates`] varies
//! the unset settings, [`savings`] selects those worth a look, and [`choose`] the cheapest candidate within a limit.

mod candidate;
mod forecast;
mod inventory;
mod parts;
mod search;
mod vary;
mod work;

pub use candidate::{Candidate, Freedom, mode};
pub use forecast::{Forecast, Forecaster};
pub use inventory::{Blueprint, Inventory};
pub use parts::{ModelBytes, SegmentBytes};
pub use search::{Found, candidates, choose, limit, savings};
pub use work::{operations, speed};
