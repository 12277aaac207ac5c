//! Analyses of a model, computed from the outside.

mod collect;

pub use collect::collect_gradients;
