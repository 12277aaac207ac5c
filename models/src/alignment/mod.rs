//! Alignment of the embeddings of two models ("Lambda-Orthogonality Regularization for Compatible Representation Learning", arXiv 2509.16664): a map
//! from the space of a new model into that of an old one, a map of the old embeddings onto it, and measures of retrieval across both.
//!
//! Embeddings are rows, `[items, width]`. Of two vectors of different length the longer is cut to the leading coordinates.

mod losses;
mod maps;
mod measures;

pub use losses::{AlignmentLoss, LossParts, LossWeights, contrastive};
pub use maps::{AlignmentMaps, Backward, BackwardKind, Rotation};
pub use measures::{Retrieval, backfilling, backfilling_order, centre_distances, retrieval};
