//! Data of a run: rows to learn from and rows to measure on.

use crate::data::Tokenizer;
use crate::objective::TokenStream;

/// Rows to learn from, rows that are held out, and what belongs to them.
pub struct RunData {
    /// Rows to learn from.
    pub train: TokenStream,
    /// Rows that are held out.
    pub validation: TokenStream,
    /// The tokenizer of both.
    pub tokenizer: Tokenizer,
    /// Hash of all that is learned from.
    pub fingerprint: String,
    /// Hash of what is held out.
    pub held_out_fingerprint: String,
    /// The held-out text itself, where it is plain text.
    pub held_out: Option<HeldOut>,
    /// Beginning and end of a sample.
    pub sample: SampleStart,
    /// One line on how much there is.
    pub told: String,
    /// Options of `lowrank generate` that ask the model in the form that it learns from.
    pub ask: String,
}

/// The held-out text.
pub struct HeldOut {
    /// Bytes.
    pub bytes: u64,
    /// Bits that `gzip -9` needs for each byte.
    pub gzip_bits_per_byte: f64,
}

/// How a sample of the model's writing begins and ends.
pub struct SampleStart {
    /// Tokens before the first that the model writes.
    pub prompt: Vec<i32>,
    /// Tokens that end it.
    pub ends: Vec<i32>,
}
