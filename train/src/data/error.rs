use std::path::{Path, PathBuf};

use lowrank_models::ModelError;

/// Error between text and batches. Every message names the file and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Images that cannot be used.
    #[error(transparent)]
    Image(#[from] super::images::ImageError),
    /// Failure of another crate's stream.
    #[error(transparent)]
    Stream(Box<dyn std::error::Error + Send + Sync>),
    /// Unreadable file or folder of the data.
    #[error("cannot read {path}: {source}; check the path and its permissions")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Cause of the failure.
        source: std::io::Error,
    },
    /// File of the cache or of an output folder that cannot be written.
    #[error("cannot write {path}: {source}; check the free space and the permissions")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Cause of the failure.
        source: std::io::Error,
    },
    /// Existing output folder.
    #[error("{path} exists already; give another folder or delete it first")]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Model file whose tokenizer cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Missing built-in corpus.
    #[error(
        "the default text, the sources of the burn crates, is not in {looked}; give your own text with `--data PATH`, or let `cargo fetch` download the sources"
    )]
    NoCorpus {
        /// Folder that was searched.
        looked: String,
    },
    /// Missing path.
    #[error("no data: give a file or folder with `--data PATH`")]
    NoPath,
    /// File named as text that is not UTF-8.
    #[error("{path} is not UTF-8 text (first bad byte at {offset}); convert it, or leave it out")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Position of the first invalid byte.
        offset: u64,
    },
    /// Text file in an unsupported encoding.
    #[error("{path} {problem}")]
    Encoding {
        /// The file.
        path: PathBuf,
        /// Encoding and remedy.
        problem: String,
    },
    /// Line of a JSON lines file that cannot be parsed.
    #[error("{path} line {line}: not valid JSON ({message}); correct or remove the line")]
    Json {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// Message of the parser.
        message: String,
    },
    /// Line of a JSON lines file without usable text.
    #[error("{path} line {line}: {problem}; name the field that holds the text with `--set data.field=NAME`")]
    Field {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// Problem with the field.
        problem: String,
    },
    /// Line of a JSON lines file that is not a training example.
    #[error("{path} line {line}: {problem}")]
    Example {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// Problem and remedy.
        problem: String,
    },
    /// Unreadable chat template.
    #[error("{path}: {problem}")]
    Template {
        /// The file.
        path: PathBuf,
        /// Problem and remedy.
        problem: String,
    },
    /// Unusable Parquet file.
    #[error("{path}: {problem}")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Problem and remedy.
        problem: String,
    },
    /// Data without a document that has text.
    #[error("no text in {paths}: {skipped}; give other data with `--data PATH`")]
    Empty {
        /// Paths that were searched.
        paths: String,
        /// Files and documents that were skipped.
        skipped: String,
    },
    /// Invalid value of a setting.
    #[error("{key} = {value}: {problem}")]
    Setting {
        /// The key.
        key: &'static str,
        /// Value of the setting.
        value: String,
        /// Problem and remedy.
        problem: String,
    },
    /// Validation documents that cannot be chosen.
    #[error("cannot set validation text aside: {problem}")]
    Split {
        /// Reason and remedy.
        problem: String,
    },
    /// Tokenizer that cannot be loaded, trained or used.
    #[error("tokenizer {name}: {problem}")]
    Tokenizer {
        /// File, or other name of the tokenizer.
        name: String,
        /// Problem and remedy.
        problem: String,
    },
    /// Fewer tokens than one sample needs.
    #[error("{path} holds {tokens} tokens but one sample needs {needed}; give more text or a smaller `--seq-len`")]
    TooFewTokens {
        /// Folder of token files.
        path: PathBuf,
        /// Number of tokens.
        tokens: u64,
        /// Number of tokens needed: the sequence length plus one.
        needed: u64,
    },
    /// Token id outside the vocabulary.
    #[error(
        "{path}: token {token} at position {position} is outside the vocabulary of {vocab_size}; make the token files again with the tokenizer of this model"
    )]
    OutOfVocabulary {
        /// The token file.
        path: PathBuf,
        /// Position in the file, in tokens.
        position: u64,
        /// Token id.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: u32,
    },
    /// Damaged token files, or files of another kind.
    #[error("{path}: {problem}; make the token files again (delete the folder)")]
    Shard {
        /// The file.
        path: PathBuf,
        /// Problem with the file.
        problem: String,
    },
}

impl DataError {
    /// Returns true if the cause is the user's input (data, paths, settings) rather than a failure of the machine while
    /// writing.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Model(error) => error.is_input(),
            other => !matches!(other, Self::Write { .. }),
        }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Read { path, source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Write { path, source }
    }

    pub(crate) fn shard(path: &Path, problem: impl Into<String>) -> Self {
        Self::Shard { path: path.to_path_buf(), problem: problem.into() }
    }
}
