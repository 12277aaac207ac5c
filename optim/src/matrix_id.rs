//! Identification of the matrices of an optimizer.

/// Identity of a matrix among those of its optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixId {
    /// Key of its random draws.
    pub key: u64,
    /// Its number, from 0.
    pub number: usize,
    /// Number of matrices; 0 if unknown.
    pub count: usize,
}
