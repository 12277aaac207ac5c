//! Tokenizers: the arrays of the metadata, and the files of a model folder that say the same.
//!
//! Byte-level byte-pair encoding (`gpt2`) with one of the known ways of cutting texts, and SentencePiece's (`llama`).

mod cuts;
mod pieces;
mod read;
mod write;

pub(super) use read::{files, id_of};
pub(super) use write::{Texts, metadata};

/// Key of the kind of tokenizer.
pub(super) const MODEL: &str = "tokenizer.ggml.model";
/// Key of the way texts are cut before merging.
pub(super) const CUT: &str = "tokenizer.ggml.pre";
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const TYPES: &str = "tokenizer.ggml.token_type";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const ADD_BEGIN: &str = "tokenizer.ggml.add_bos_token";
pub(super) const ADD_END: &str = "tokenizer.ggml.add_eos_token";
pub(super) const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
pub(super) const TEMPLATE: &str = "tokenizer.chat_template";
/// Key of the names of further chat templates, each under [`TEMPLATE`] and its name.
pub(super) const TEMPLATES: &str = "tokenizer.chat_templates";

/// Kinds of tokenizers: byte-level, SentencePiece's, and none.
const BYTE_LEVEL: &str = "gpt2";
const PIECES: &str = "llama";
const NONE: &str = "none";

/// Types of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Text of a row of the embedding that no token has.
fn filler(id: usize) -> String {
    format!("[PAD{id}]")
}
