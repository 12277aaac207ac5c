//! A document: one text of the data.

/// One text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// File, and line where there are several in it.
    pub name: String,
    /// The text.
    pub text: String,
}
