//! Adapters and the layers of a module: which ones, put on them, changed in size, read without them.

pub(crate) mod attach;
mod factors;
mod resize;
pub(crate) mod resolve;

pub use attach::{Adapted, Attach, BaseGradients, Report, SHARED, adapters_of, detach};
pub use factors::{LayerFactors, factors_of};
pub use resize::{Resize, resize, sizes};
