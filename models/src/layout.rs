//! Order of matrices in files.

/// Order of a matrix in a Hugging Face file relative to its order in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The same order (embeddings).
    AsStored,
    /// Files hold `[d_out, d_in]`, the model `[d_in, d_out]` (linear layers).
    Transposed,
}
