//! Tokenizers: the arrays of the metadata, and the files of a model folder that say the same.
//!
//! Byte-level byte-pair encoding (`gpt2`) with one of the known ways of cutting texts, and SentencePiece's (`llama`).

mod cuts;
mod keys;
mod pieces;
mod read;
mod write;

pub(super) use read::{files, id_of};
pub(super) use write::{Texts, metadata};
