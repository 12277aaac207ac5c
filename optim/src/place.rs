//! Which matrix of an optimizer this is.

/// Where a matrix stands among those of its optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Tells the random draws of different matrices apart.
    pub key: u64,
    /// Its number, from 0.
    pub number: usize,
    /// How many there are; 0 when nobody counted them.
    pub count: usize,
}
