//! Options for making examples.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::{ChatTemplate, HeldOut, Source, Tokenizer};

/// Treatment of examples with more tokens than a row takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// The end is cut off.
    #[default]
    Truncate,
    /// The example is left out.
    Drop,
    /// The data is refused.
    Error,
}

/// Data, tokenizer and limits of examples.
#[derive(Debug)]
pub struct ExampleOptions<'a> {
    /// JSON lines; `field` is the one of texts.
    pub source: &'a Source,
    /// Examples to validate on.
    pub held_out: &'a HeldOut,
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Chat template of the model, if it has one.
    pub template: Option<&'a ChatTemplate>,
    /// Token after each completion and text.
    pub end: u32,
    /// Rows of the model's embedding; larger token ids are rejected.
    pub vocab_size: usize,
    /// Trains on prompts and the other turns too.
    pub learn_prompt: bool,
    /// Maximum number of inputs of an example.
    pub seq_len: usize,
    /// Setting that states it.
    pub length_key: &'a str,
    /// Treatment of longer ones.
    pub too_long: TooLong,
    /// Seed of the choice of held-out examples.
    pub seed: u64,
    /// Folder for tokens that do not stay in memory.
    pub cache: &'a Path,
    /// Names of the fields that an objective requests; others are not kept.
    pub fields: &'a [String],
}
