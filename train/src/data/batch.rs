use std::num::NonZeroU64;
use std::sync::Arc;

use super::{DataError, Order, Shards};

/// Target of a position that is ignored.
pub const IGNORE: i32 = -100;

/// Token windows for one forward pass; every vector is row-major, `[batch, seq_len]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Tokens.
    pub inputs: Vec<i32>,
    /// The token that follows each input, or [`IGNORE`].
    pub targets: Vec<i32>,
    /// Index within the row of the start of each position's document: the last separator at or before it, or 0.
    pub starts: Vec<i32>,
    /// Number of rows.
    pub batch: usize,
    /// Number of positions in a row.
    pub seq_len: usize,
    /// Fields of the examples in the rows, if they have any.
    pub tags: Vec<Tag>,
}

/// Fields of an example in addition to its text, such as a label, a domain or a client.
pub type Fields = serde_json::Map<String, serde_json::Value>;

/// Example inside a batch with its fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    /// Row of the example.
    pub row: usize,
    /// First position in the row.
    pub start: usize,
    /// Number of positions.
    pub len: usize,
    /// Fields of the example.
    pub fields: Arc<Fields>,
}

impl Tag {
    /// Moves the tag to another row.
    pub fn in_row(self, row: usize) -> Self {
        Self { row, ..self }
    }
}

impl Batch {
    /// Number of targets that are not ignored.
    pub fn counted(&self) -> u64 {
        self.targets.iter().filter(|&&t| t != IGNORE).count() as u64
    }
}

/// Rows in the order of a run.
pub trait Samples {
    /// Rows of a batch.
    fn batch(&self) -> usize;

    /// Rows in one epoch.
    fn rows(&self) -> u64;

    /// The samples `position..position + batch`, counted from 0 over the whole run; data that is read once ends with a
    /// smaller batch.
    fn at(&self, position: u64) -> Result<Batch, DataError>;
}

/// The batches of one epoch.
pub fn epoch(samples: &dyn Samples) -> impl Iterator<Item = Result<Batch, DataError>> + '_ {
    (0..samples.rows()).step_by(samples.batch()).map(|position| samples.at(position))
}

/// Cuts the stream of tokens into windows of `seq_len` inputs and serves them as batches.
///
/// Window `w` starts at token `w * seq_len`, so the windows of one epoch predict every token but the very first.
#[derive(Debug, Clone)]
pub struct Batches {
    shards: Shards,
    batch: usize,
    seq_len: usize,
    windows: u64,
    order: Option<Order>,
}

impl Batches {
    /// Training batches in the order of [`Order`]. If the tokens do not divide evenly, the last window starts earlier
    /// and repeats a part of the one before it, so that no token is left out.
    ///
    /// # Errors
    /// Fewer than `seq_len + 1` tokens, or a size of 0.
    pub fn train(shards: Shards, batch: usize, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        let needed = seq_len as u64 + 1;
        let mut batches = Self::new(shards, batch, seq_len, needed)?;
        batches.order = NonZeroU64::new(batches.windows).map(|n| Order::new(n, seed));
        Ok(batches)
    }

    /// Validation batches: the windows in order, every token but the very first predicted exactly once. The last window
    /// is padded with separators whose targets are [`IGNORE`]; the last batch may have fewer rows.
    ///
    /// # Errors
    /// Fewer than two tokens, or a size of 0.
    pub fn validation(shards: Shards, batch: usize, seq_len: usize) -> Result<Self, DataError> {
        Self::new(shards, batch, seq_len, 2)
    }

    fn new(shards: Shards, batch: usize, seq_len: usize, needed: u64) -> Result<Self, DataError> {
        for (key, value) in [("train.batch", batch), ("train.seq_len", seq_len)] {
            // Indices inside a row are stored as i32.
            if value == 0 || value > i32::MAX as usize {
                return Err(DataError::Setting {
                    key,
                    value: value.to_string(),
                    problem: "must be at least 1 and fit 31 bits".into(),
                });
            }
        }
        let tokens = shards.len();
        if tokens < needed {
            return Err(DataError::TooFewTokens { path: shards.folder().to_path_buf(), tokens, needed });
        }
        Ok(Self { windows: (tokens - 1).div_ceil(seq_len as u64), shards, batch, seq_len, order: None })
    }

    /// Appends the row whose inputs start at token `first`; `len` of them have a target.
    fn row(&self, first: u64, len: u64, batch: &mut Batch) -> Result<(), DataError> {
        let separator = self.shards.separator() as i32;
        let begin = batch.inputs.len();
        self.shards.copy(first, len, |token| batch.inputs.push(token as i32))?;
        self.shards.copy(first + 1, len, |token| batch.targets.push(token as i32))?;
        batch.inputs.resize(begin + self.seq_len, separator);
        batch.targets.resize(begin + self.seq_len, IGNORE);
        let mut start = 0;
        for (i, &token) in batch.inputs[begin..].iter().enumerate() {
            if token == separator {
                start = i as i32;
            }
            batch.starts.push(start);
        }
        Ok(())
    }
}

impl Samples for Batches {
    fn batch(&self) -> usize {
        self.batch
    }

    fn rows(&self) -> u64 {
        self.windows
    }

    /// Rejects a token outside the vocabulary, and a position beyond the end of the validation data.
    fn at(&self, position: u64) -> Result<Batch, DataError> {
        let rows = match self.order {
            Some(_) => self.batch,
            None => self.windows.saturating_sub(position).min(self.batch as u64) as usize,
        };
        let size = rows * self.seq_len;
        let mut batch = Batch {
            inputs: Vec::with_capacity(size),
            targets: Vec::with_capacity(size),
            starts: Vec::with_capacity(size),
            batch: rows,
            seq_len: self.seq_len,
            tags: Vec::new(),
        };
        if rows == 0 {
            let problem = format!("sample {position} of {} was asked for", self.windows);
            return Err(DataError::shard(self.shards.folder(), problem));
        }
        let last = self.shards.len() - 1;
        let seq_len = self.seq_len as u64;
        for row in 0..rows as u64 {
            let first = match &self.order {
                Some(order) => (order.window(position + row).1 * seq_len).min(last - seq_len),
                None => (position + row) * seq_len,
            };
            self.row(first, seq_len.min(last - first), &mut batch)?;
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ShardWriter;
    use super::*;
    use std::collections::HashSet;

    /// Creates `count` tokens, token `i` being `1 + i`, but 0 at every position in `separators`.
    fn shards(count: u32, separators: &[u32]) -> (tempfile::TempDir, Shards) {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tokens");
        let tokens: Vec<u32> = (0..count).map(|i| if separators.contains(&i) { 0 } else { 1 + i }).collect();
        let mut writer = ShardWriter::create(&folder, count + 1, 0, "t".into(), 37).unwrap();
        writer.push(&tokens, 1).unwrap();
        writer.finish().unwrap();
        let shards = Shards::open(&folder).unwrap();
        (dir, shards)
    }

    #[test]
    fn an_epoch_predicts_every_token() {
        for count in [9, 16, 17, 18, 200] {
            let (_dir, shards) = shards(count, &[0]);
            let batches = Batches::train(shards, 3, 8, 5).unwrap();
            let n = batches.rows();
            let mut targets = HashSet::new();
            for epoch in 0..2 {
                for sample in 0..n {
                    let b = batches.at(epoch * n + sample).unwrap();
                    for i in 0..8 {
                        assert!(b.inputs[i] == 0 || b.targets[i] == b.inputs[i] + 1);
                    }
                    targets.extend(b.targets[..8].iter().copied());
                }
                assert_eq!(targets.len() as u32, count - 1);
                targets.clear();
            }
        }
    }

    #[test]
    fn any_position_continues_the_same_stream() {
        let (_dir, shards) = shards(500, &[0]);
        let batches = Batches::train(shards.clone(), 4, 8, 1).unwrap();
        let single = Batches::train(shards, 1, 8, 1).unwrap();
        for position in [0, 3, 61, 62, 1000] {
            let b = batches.at(position).unwrap();
            for row in 0..4 {
                let one = single.at(position + row as u64).unwrap();
                assert_eq!(b.inputs[row * 8..][..8], one.inputs);
                assert_eq!(b.targets[row * 8..][..8], one.targets);
            }
        }
    }

    #[test]
    fn validation_predicts_every_token_once() {
        for count in [2, 8, 9, 10, 100] {
            let (_dir, shards) = shards(count, &[0]);
            let batches = Batches::validation(shards, 3, 8).unwrap();
            let mut targets = Vec::new();
            let mut counted = 0;
            for batch in epoch(&batches) {
                let batch = batch.unwrap();
                assert_eq!(batch.inputs.len(), batch.batch * 8);
                assert_eq!(batch.targets.len(), batch.batch * 8);
                counted += batch.counted() as usize;
                targets.extend(batch.targets.into_iter().filter(|&t| t != IGNORE));
            }
            assert_eq!(targets, (2..=count as i32).collect::<Vec<_>>());
            assert_eq!(counted, targets.len());
            assert!(batches.at(batches.rows()).is_err());
        }
    }

    #[test]
    fn starts_follow_the_separators() {
        let (_dir, shards) = shards(20, &[0, 3, 4, 9]);
        let batches = Batches::validation(shards, 2, 8).unwrap();
        let batch = batches.at(0).unwrap();
        assert_eq!(batch.starts[..8], [0, 0, 0, 3, 4, 4, 4, 4]);
        assert_eq!(batch.starts[8..], [0, 1, 1, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn too_little_is_refused_with_numbers() {
        let (_dir, shards) = shards(8, &[0]);
        let error = Batches::train(shards.clone(), 1, 8, 0).unwrap_err();
        assert!(matches!(error, DataError::TooFewTokens { tokens: 8, needed: 9, .. }));
        assert!(Batches::train(shards.clone(), 0, 4, 0).is_err());
        assert!(Batches::train(shards, 1, 0, 0).is_err());
    }
}
