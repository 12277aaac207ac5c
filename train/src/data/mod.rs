//! From text to batches of tokens.
//!
//! ```text
//! Source -> documents -> Tokenizer -> Shards (memory-mapped) -> Batches (in the order of Order) -> Batch
//! ```
//!
//! For fine-tuning, JSON lines -> [`Examples`] -> [`Rows`] -> [`Batch`], all in memory.
//!
//! [`prepare()`] does everything up to the shards once and keeps the result in a cache; [`Batches`] reads from them. Nothing here holds more
//! than some megabytes of text in memory, and nothing writes to the terminal: long work reports through a callback taking [`Progress`].

mod batch;
mod chat;
mod corpus;
mod error;
mod examples;
mod json_lines;
mod order;
mod prepare;
mod rows;
mod shards;
mod source;
mod split;
mod text;
mod tokenizer;

pub use batch::{Batch, Batches, IGNORE, Samples, epoch};
pub use chat::ChatTemplate;
pub use corpus::default_corpus;
pub use error::DataError;
pub use examples::{Example, ExampleOptions, Examples, Marks};
pub use order::Order;
pub use prepare::{PrepareOptions, Prepared, TokenizerChoice, prepare, tokenize};
pub use rows::Rows;
pub use shards::{Manifest, ShardFile, ShardWriter, Shards, TOKENS_PER_FILE};
pub use source::{Document, Documents, Format, Skipped, Source};
pub use tokenizer::Tokenizer;

/// What a long operation is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Reading the text once to choose what is held out.
    Scan,
    /// Training the tokenizer.
    TrainTokenizer,
    /// Turning text into tokens.
    Encode,
    /// Checking the hashes of token files.
    Verify,
}

/// How far a long operation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The operation.
    pub stage: Stage,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all; 0 when not known.
    pub total: u64,
}
