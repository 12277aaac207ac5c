//! Initial values of a pair of factors.

/// Row-major factors `A [d_in, rank]` and `B [rank, d_out]`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
}
