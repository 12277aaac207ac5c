//! Compositions: several adapters made into one, or into a pool that gives each one back. They work on the factors of one layer at a time and
//! need no model. One file each.
//!
//! ```
//! use lowrank_adapters::compose::{Composition, Layer, Matrix, Source};
//! # fn main() -> Result<(), lowrank_adapters::compose::ComposeError> {
//! let source = |name: &str, value: f64| Source {
//!     adapter: name.into(),
//!     a: Matrix::from_element(1, 3, value),
//!     b: Matrix::from_element(2, 1, 1.0),
//!     scale: 1.0,
//!     weight: None,
//!     basis: None,
//! };
//! let layer = Layer::new("layer", vec![source("one", 1.0), source("two", 2.0)])?;
//! let sum = <dyn Composition>::named("cat", &Default::default())?.compose(&layer)?;
//! assert_eq!(sum.result.into_delta().map(|delta| delta[(0, 0)]), Some(3.0));
//! # Ok(())
//! # }
//! ```

mod algebra;
mod average;
mod cat;
mod dare;
mod definition;
mod error;
mod kmeans;
mod knots;
mod lego;
mod linear;
mod magnitude_prune;
mod orthogonal_sum;
mod pool;
mod rmm;
mod slerp;
mod source;
mod sparse;
mod svd;
#[cfg(test)]
mod tests;
mod ties;

use lowrank_optim::registry::{Kind, Options, find};

pub use algebra::truncated;
pub use average::{Average, Space};
pub use cat::Cat;
pub use dare::{Dare, DareMerge, Rescale};
pub use definition::{Composed, Composite, Composition, CompositionEntry, Figures, LayerSize};
pub use error::ComposeError;
pub use kmeans::Clusters;
pub use knots::{Knots, KnotsMerge};
pub use lego::{Clustered, Lego};
pub use linear::Linear;
pub use magnitude_prune::MagnitudePrune;
pub use orthogonal_sum::{Crosstalk, OrthogonalSum, crosstalk};
pub use pool::{PoolLayer, Side};
pub use rmm::Rmm;
pub use slerp::Slerp;
pub use source::{Layer, Matrix, Source};
pub use sparse::{Convention, Election};
pub use svd::SvdSum;
pub use ties::Ties;

/// All compositions.
pub static COMPOSITIONS: &[&CompositionEntry] = &[
    &cat::ENTRY,
    &linear::ENTRY,
    &average::ENTRY,
    &svd::ENTRY,
    &ties::ENTRY,
    &dare::ENTRY,
    &magnitude_prune::ENTRY,
    &knots::ENTRY,
    &slerp::ENTRY,
    &lego::ENTRY,
    &rmm::ENTRY,
    &orthogonal_sum::ENTRY,
];

impl CompositionEntry {
    /// Returns the composition of this name.
    pub fn find(name: &str) -> Result<&'static Self, ComposeError> {
        Ok(find(Kind::Composition, COMPOSITIONS.iter().copied(), name)?)
    }
}

impl dyn Composition {
    /// Returns the composition of this name with the given options on top of its defaults.
    pub fn named(name: &str, options: &Options) -> Result<Box<Self>, ComposeError> {
        (CompositionEntry::find(name)?.read)(options)
    }
}
