//! Operations of models, with their backward passes, for tensors of any Burn model.
//!
//! Shapes: `b` rows of a batch, `t` positions, `h` heads, `d` width.

mod attention;
mod bit_quantiser;
#[cfg(test)]
mod check;
mod cross_entropy;
mod distance_kernel;
mod embedding;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
mod fused;
mod gelu;
mod layer_norm;
mod linear;
mod low_rank_linear;
#[cfg(feature = "flex")]
mod product;
mod random_bases;
mod rms_norm;
mod rotary;
mod running_products;
mod scaled_bases;
mod sparse_cosines;
mod sparse_low_rank;
#[cfg(feature = "flex")]
mod sparse_product;
mod swiglu;
mod update_score;
mod widened;

pub use attention::{attention, causal_attention, scaled_causal_attention};
pub use bit_quantiser::bit_quantised;
pub use cross_entropy::{IGNORE, LOSS_ROWS, linear_cross_entropy};
pub use distance_kernel::{DistanceKernel, KeptValue, Sparsify, quantile_of_magnitudes};
pub use embedding::embedding;
#[cfg(feature = "flex")]
pub(crate) use flex::on_flex;
#[cfg(feature = "flex")]
pub use fused::set_fused;
pub use gelu::{Gelu, gelu};
pub use layer_norm::layer_norm;
pub use linear::{MatrixProduct, linear};
pub use low_rank_linear::{low_rank_linear, lr_scaled_low_rank_linear, lr_scaled_product};
pub use random_bases::{draws, mixed, mixed_draws};
pub use rms_norm::rms_norm;
pub use rotary::{Rotary, rotary};
pub use running_products::running_products;
pub use scaled_bases::scaled_bases;
pub use sparse_cosines::{moves_positions, pixels, sparse_cosines};
pub use sparse_low_rank::{sparse_low_rank, sparse_matrix};
pub use swiglu::swiglu;
pub use update_score::{UpdateScore, scored, scores_on};
pub use widened::widened;
