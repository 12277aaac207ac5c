//! Progress of long operations.

/// Stage of a long operation.
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

/// Progress of a long operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The operation.
    pub stage: Stage,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all; 0 when not known.
    pub total: u64,
}
