//! Keys and codes of tokenizers in the metadata.

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
pub(super) const BYTE_LEVEL: &str = "gpt2";
pub(super) const PIECES: &str = "llama";
pub(super) const NONE: &str = "none";

/// Types of tokens.
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// Text of a row of the embedding that no token has.
pub(super) fn filler(id: usize) -> String {
    format!("[PAD{id}]")
}
