//! Operations on adapters and the layers of a module: selecting layers, attaching, resizing, and reading without a
//! model.

pub(crate) mod attach;
mod detach;
mod factors;
mod report;
mod resize;
pub(crate) mod resolve;

pub use attach::{Attach, BaseGradients, SHARED};
pub use detach::{adapters_of, detach};
pub use factors::{LayerFactors, factors_of, start_of};
pub use report::{Adapted, Report};
pub(crate) use resize::rebuild;
pub use resize::{MakeStructure, Resize, resize, sizes};
