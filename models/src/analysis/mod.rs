//! What is computed about a model, and not by it.

mod collect;

pub use collect::collect_gradients;
