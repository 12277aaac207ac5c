//! Operations on adapters and the layers of a module: selecting layers, attaching, resizing, and reading without a
//! model.

pub(crate) mod attach;
mod factors;
mod resize;
pub(crate) mod resolve;

pub use attach::{Adapted, Attach, BaseGradients, Report, SHARED, adapters_of, detach};
pub use factors::{LayerFactors, factors_of, start_of};
pub(crate) use resize::rebuild;
pub use resize::{MakeStructure, Resize, resize, sizes};
