//! A document: a single text of the data.

/// Single text of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// File, and line if the file holds several documents.
    pub name: String,
    /// Text of the document.
    pub text: String,
}
