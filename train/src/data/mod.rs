//! From text to batches of tokens.
//!
//! ```text
//! Source -> documents -> Tokenizer -> Shards (memory-mapped) -> Batches (in the order of Order) -> Batch
//! ```
//!
//! For fine-tuning, JSON lines -> [`Examples`] -> [`Rows`] -> [`Batch`], all in memory.
//!
//! [`prepare()`] runs everything up to the shards once and keeps the result in a cache; [`Batches`] reads from them.
//! Nothing here holds more than some megabytes of text in memory or writes to the terminal: long operations report
//! through a callback with [`Progress`].

mod batch;
mod chat;
mod corpus;
mod document;
mod error;
mod examples;
mod held_out;
pub mod images;
mod json;
mod json_lines;
mod model_file;
mod open;
mod order;
mod prepare;
mod progress;
mod rows;
mod shards;
mod source;
mod special_tokens;
mod split;
mod text;
mod tokenizer;

pub use batch::{Batch, Batches, Fields, IGNORE, Samples, Tag, epoch};
pub use chat::{ChatTemplate, Conversation};
pub use corpus::default_corpus;
pub use document::Document;
pub use error::DataError;
pub use examples::{
    Example, ExampleList, ExampleOptions, Examples, Located, Location, Question, Read, TooLong, each_example,
    each_question,
};
pub use held_out::HeldOut;
pub use json::Json;
pub use order::Order;
pub use prepare::{PrepareOptions, Prepared, TokenizerChoice, prepare, tokenize};
pub use progress::{Progress, Stage};
pub use rows::Rows;
pub use shards::{Manifest, ShardFile, ShardWriter, Shards, TOKENS_PER_FILE};
pub use source::{Documents, Format, Held, Skipped, Source};
pub use tokenizer::Tokenizer;
