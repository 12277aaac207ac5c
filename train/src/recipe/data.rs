//! Data of a run: training rows and held-out rows.

use crate::data::Tokenizer;
use crate::objective::TokenStream;

/// Training rows, held-out rows, and related data.
pub struct RunData {
    /// Training rows.
    pub train: TokenStream,
    /// Held-out rows.
    pub validation: TokenStream,
    /// Tokenizer of both.
    pub tokenizer: Tokenizer,
    /// Hash of all training data.
    pub fingerprint: String,
    /// Hash of the held-out data.
    pub held_out_fingerprint: String,
    /// Held-out text itself, if it is plain text.
    pub held_out: Option<HeldOut>,
    /// Start and end of a sample.
    pub sample: SampleStart,
    /// One-line description of the amount of data.
    pub told: String,
    /// Options of `lowrank generate` that prompt the model in the form of its training data.
    pub ask: String,
}

/// Held-out text.
pub struct HeldOut {
    /// Size in bytes.
    pub bytes: u64,
    /// Bits that `gzip -9` needs for each byte.
    pub gzip_bits_per_byte: f64,
}

/// Start and end of a generated sample.
pub struct SampleStart {
    /// Tokens before the first generated one.
    pub prompt: Vec<i32>,
    /// Tokens that end it.
    pub ends: Vec<i32>,
}
