//! Description of an initialisation.

use std::ops::Deref;

use lowrank_optim::registry::{Entry, Kind, Paper, Registered};

/// An initialisation of the tensors of some structures, in addition to the default of each.
#[derive(Clone, Copy, Debug)]
pub struct Initialisation {
    /// Description.
    pub entry: Entry,
    /// True if the factors start as part of the weight; that product is subtracted from the base while the adapter runs.
    pub starts_from_weight: bool,
    /// True if it changes the output of the layer.
    pub changes_output: bool,
    /// True if it needs gradients of the base weights, see [`Attach::with_gradients`](crate::Attach::with_gradients).
    pub needs_gradients: bool,
    /// Option of the structure that takes the first learning rate of the run if it is not given.
    pub first_rate: Option<&'static str>,
}

impl Initialisation {
    /// Initialisation that keeps the output of the layer and needs nothing, to be completed with `..`.
    pub const fn plain(name: &'static str, summary: &'static str, papers: &'static [Paper]) -> Self {
        Self {
            entry: Entry { papers, ..Entry::plain(Kind::Initialisation, name, summary) },
            starts_from_weight: false,
            changes_output: false,
            needs_gradients: false,
            first_rate: None,
        }
    }
}

impl Deref for Initialisation {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Registered for Initialisation {
    fn entry(&self) -> &Entry {
        &self.entry
    }
}
