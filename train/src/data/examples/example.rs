//! The tokens of one example.

use std::sync::Arc;

use crate::data::{Fields, IGNORE};

/// Tokens of one example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// All tokens but the last.
    pub inputs: Vec<i32>,
    /// The token that follows each input, or [`IGNORE`].
    pub targets: Vec<i32>,
    /// Requested fields that its line has in addition to the text; none if it has none of them.
    pub fields: Option<Arc<Fields>>,
}

impl Example {
    /// Creates an example from the tokens `ids`, with targets where `learned` is true, truncated to `seq_len` inputs.
    pub(super) fn new(mut ids: Vec<u32>, learned: &[bool], seq_len: usize) -> Self {
        ids.truncate(seq_len + 1);
        let target = |(id, learned): (&u32, &bool)| if *learned { *id as i32 } else { IGNORE };
        Self {
            inputs: ids[..ids.len().saturating_sub(1)].iter().map(|id| *id as i32).collect(),
            targets: ids.iter().zip(learned).skip(1).map(target).collect(),
            fields: None,
        }
    }

    /// Number of targets that are not ignored.
    pub fn learned(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORE).count()
    }

    /// Inputs before the first target that is not ignored: the model's context when it starts to write.
    pub fn prompt(&self) -> &[i32] {
        let first = self.targets.iter().position(|target| *target != IGNORE);
        &self.inputs[..first.map_or(self.inputs.len(), |first| first + 1)]
    }
}
