use std::path::{Path, PathBuf};

/// What can go wrong between text and batches. Every message names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A stream of another crate failed.
    #[error(transparent)]
    Stream(Box<dyn std::error::Error + Send + Sync>),
    /// A file or folder of the data cannot be read.
    #[error("cannot read {path}: {source}; check the path and its permissions")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file of the cache or of an output folder cannot be written.
    #[error("cannot write {path}: {source}; check the free space and the permissions")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The output folder is there already.
    #[error("{path} exists already; give another folder or delete it first")]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// The built-in corpus is not on this machine.
    #[error(
        "the default text, the sources of the burn crates, is not in {looked}; give your own text with `--data PATH`, or let `cargo fetch` download the sources"
    )]
    NoCorpus {
        /// The folder searched.
        looked: String,
    },
    /// No path was given.
    #[error("no data: give a file or folder with `--data PATH`")]
    NoPath,
    /// A file that was named as text is not UTF-8.
    #[error("{path} is not UTF-8 text (first bad byte at {offset}); convert it, or leave it out")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Position of the first bad byte.
        offset: u64,
    },
    /// A file is text in another form than is read.
    #[error("{path} {problem}")]
    Encoding {
        /// The file.
        path: PathBuf,
        /// What it is and what to do.
        problem: String,
    },
    /// A line of a JSON lines file does not parse.
    #[error("{path} line {line}: not valid JSON ({message}); correct or remove the line")]
    Json {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// What the parser said.
        message: String,
    },
    /// A line of a JSON lines file has no usable text.
    #[error("{path} line {line}: {problem}; name the field that holds the text with `--set data.field=NAME`")]
    Field {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// What is wrong with the field.
        problem: String,
    },
    /// A line of a JSON lines file is no example to learn from.
    #[error("{path} line {line}: {problem}")]
    Example {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: u64,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A chat template cannot be read.
    #[error("{path}: {problem}")]
    Template {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A Parquet file cannot be used.
    #[error("{path}: {problem}")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// No document with text was found.
    #[error("no text in {paths}: {skipped}; give other data with `--data PATH`")]
    Empty {
        /// The paths searched.
        paths: String,
        /// What was passed over.
        skipped: String,
    },
    /// A setting has a value that makes no sense.
    #[error("{key} = {value}: {problem}")]
    Setting {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The validation documents cannot be chosen.
    #[error("cannot set validation text aside: {problem}")]
    Split {
        /// Why, and what to do.
        problem: String,
    },
    /// A tokenizer cannot be loaded, trained or used.
    #[error("tokenizer {name}: {problem}")]
    Tokenizer {
        /// The file, or what else the tokenizer is known by.
        name: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// There are fewer tokens than one sample needs.
    #[error("{path} holds {tokens} tokens but one sample needs {needed}; give more text or a smaller `--seq-len`")]
    TooFewTokens {
        /// The folder of token files.
        path: PathBuf,
        /// Tokens there are.
        tokens: u64,
        /// Tokens needed: the sequence length and one.
        needed: u64,
    },
    /// A token id is not in the vocabulary.
    #[error(
        "{path}: token {token} at position {position} is outside the vocabulary of {vocab_size}; make the token files again with the tokenizer of this model"
    )]
    OutOfVocabulary {
        /// The token file.
        path: PathBuf,
        /// Position in the file, in tokens.
        position: u64,
        /// The id.
        token: u32,
        /// Ids there are.
        vocab_size: u32,
    },
    /// Token files are damaged or of another kind.
    #[error("{path}: {problem}; make the token files again (delete the folder)")]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

impl DataError {
    /// Whether the cause is in what the user gave (data, paths, settings) rather than a failure of the machine while writing.
    pub fn is_input(&self) -> bool {
        !matches!(self, Self::Write { .. })
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
