//! Matrices in codes.

use super::four_bit::{FourBit, Scales};
use super::ggml::Blocks;
use super::groups::QuantisedGroups;

/// Stored form of the values of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub enum Codes {
    /// 8-bit integers in groups of this number of values.
    Groups(QuantisedGroups, usize),
    /// 4-bit codes.
    FourBit(FourBit),
    /// Blocks of llama.cpp.
    Blocks(Blocks),
}

/// A matrix in codes.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedMatrix {
    /// `[d_in, d_out]`.
    pub shape: [usize; 2],
    /// The values follow each other as in `[d_out, d_in]`.
    pub transposed: bool,
    /// Values.
    pub codes: Codes,
}

impl PackedMatrix {
    /// All values as `[d_in, d_out]` or, if transposed, `[d_out, d_in]`.
    pub fn restored(&self) -> Vec<f32> {
        match &self.codes {
            Codes::Groups(groups, group) => groups.restored(*group),
            Codes::FourBit(stored) => stored.restored(),
            Codes::Blocks(blocks) => blocks.restored(),
        }
    }

    /// Bytes of the codes and of what restores them.
    pub fn bytes(&self) -> usize {
        match &self.codes {
            Codes::Groups(groups, _) => groups.codes.len() + 5 * groups.scales.len(),
            Codes::FourBit(stored) => {
                FourBit::bytes(stored.count, stored.block, matches!(stored.scales, Scales::Double { .. }))
            }
            Codes::Blocks(blocks) => blocks.bytes.len(),
        }
    }
}
