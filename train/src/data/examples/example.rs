//! The tokens of one example.

use std::sync::Arc;

use crate::data::{Fields, IGNORE};

/// Tokens of one example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Tokens but the last.
    pub inputs: Vec<i32>,
    /// The token that follows each input, or [`IGNORE`].
    pub targets: Vec<i32>,
    /// Fields that were asked for, of those that its line has beside the text; none when it has none of them.
    pub fields: Option<Arc<Fields>>,
}

impl Example {
    /// The tokens `ids`, of which those where `learned` count, cut to `seq_len` inputs.
    pub(super) fn new(mut ids: Vec<u32>, learned: &[bool], seq_len: usize) -> Self {
        ids.truncate(seq_len + 1);
        let target = |(id, learned): (&u32, &bool)| if *learned { *id as i32 } else { IGNORE };
        Self {
            inputs: ids[..ids.len().saturating_sub(1)].iter().map(|id| *id as i32).collect(),
            targets: ids.iter().zip(learned).skip(1).map(target).collect(),
            fields: None,
        }
    }

    /// Targets that count.
    pub fn learned(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORE).count()
    }

    /// The inputs before the first target that counts: what the model has seen when it begins to write.
    pub fn prompt(&self) -> &[i32] {
        let first = self.targets.iter().position(|target| *target != IGNORE);
        &self.inputs[..first.map_or(self.inputs.len(), |first| first + 1)]
    }
}
