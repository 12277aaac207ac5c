//! Two factors that now and then step along the manifold of their products ("Parameter and Memory Efficient Pretraining via Low-rank Riemannian
//! Optimization", ICLR 2025). The layer is [`LowRank`] with another beginning; what differs is how it is stepped.

use super::LowRank;
use crate::error::ModelError;
use crate::weights::{Builder, Init, Layout};

impl LowRank {
    /// Both factors normal, of deviation `sqrt(2 / (rows + columns))`.
    pub(super) fn build_loro(
        builder: &mut Builder,
        path: &str,
        d_in: usize,
        d_out: usize,
        rank: usize,
    ) -> Result<Self, ModelError> {
        let xavier = |side: usize| Init::Normal((2.0 / (side + rank) as f64).sqrt());
        Ok(Self {
            a: builder.matrix(&format!("{path}.a"), [d_in, rank], Layout::Transposed, xavier(d_in))?,
            b: builder.matrix(&format!("{path}.b"), [rank, d_out], Layout::Transposed, xavier(d_out))?,
        })
    }
}
