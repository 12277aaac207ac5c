//! Examples as rows of batches: one per row, or several if they fit.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use super::{Batch, DataError, ExampleList, IGNORE, Order, Samples, Tag};

/// Rows of examples. A batch is as wide as its longest row; shorter ones are padded at the end, where nothing attends
/// and nothing counts.
#[derive(Clone, Debug)]
pub struct Rows {
    examples: ExampleList,
    /// Numbers of the examples in each row; none if each has its own.
    packed: Option<Vec<Vec<usize>>>,
    batch: usize,
    fill: i32,
    order: Option<Order>,
}

impl Rows {
    /// Creates rows of one example each; `fill` is the padding token. Both numbers are at least 1.
    pub fn new(examples: impl Into<ExampleList>, batch: usize, fill: u32) -> Self {
        Self { examples: examples.into(), packed: None, batch: batch.max(1), fill: fill as i32, order: None }
    }

    /// Packs several examples into a row, up to `width` tokens: each goes where the least space is left, in the order
    /// of the seed.
    pub fn packed(mut self, width: usize, seed: u64) -> Self {
        let Some(count) = NonZeroU64::new(self.examples.len() as u64) else { return self };
        let order = Order::new(count, seed);
        // Rows by the space that is left.
        let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut rows: Vec<Vec<usize>> = Vec::new();
        for position in 0..count.get() {
            let number = order.window(position).1 as usize;
            let len = self.examples.inputs(number);
            let room = open.range(len..).next().map(|(room, _)| *room);
            let row = room.and_then(|room| {
                let with_room = open.get_mut(&room)?;
                let row = with_room.pop()?;
                if with_room.is_empty() {
                    open.remove(&room);
                }
                Some((row, room))
            });
            let (row, room) = row.unwrap_or_else(|| {
                rows.push(Vec::new());
                (rows.len() - 1, width.max(len))
            });
            rows[row].push(number);
            open.entry(room - len).or_default().push(row);
        }
        self.packed = Some(rows);
        self
    }

    /// Repeats endlessly, in a different order in each epoch.
    pub fn shuffled(mut self, seed: u64) -> Self {
        self.order = NonZeroU64::new(self.rows()).map(|count| Order::new(count, seed));
        self
    }

    /// The examples.
    pub fn examples(&self) -> &ExampleList {
        &self.examples
    }
}

impl Samples for Rows {
    fn batch(&self) -> usize {
        self.batch
    }

    fn rows(&self) -> u64 {
        self.packed.as_ref().map_or(self.examples.len(), Vec::len) as u64
    }

    fn at(&self, position: u64) -> Result<Batch, DataError> {
        let rows: Vec<usize> = match &self.order {
            Some(order) => (0..self.batch as u64).map(|k| order.window(position + k).1 as usize).collect(),
            None => (position as usize..self.rows() as usize).take(self.batch).collect(),
        };
        let chosen: Vec<Vec<usize>> = match &self.packed {
            Some(packed) => rows.into_iter().map(|row| packed[row].clone()).collect(),
            None => rows.into_iter().map(|number| vec![number]).collect(),
        };
        let len = |row: &[usize]| row.iter().map(|number| self.examples.inputs(*number)).sum::<usize>();
        let width = chosen.iter().map(|row| len(row)).max().unwrap_or(0);
        let mut batch = Batch {
            inputs: Vec::with_capacity(chosen.len() * width),
            targets: Vec::with_capacity(chosen.len() * width),
            starts: Vec::with_capacity(chosen.len() * width),
            batch: chosen.len(),
            seq_len: width,
            tags: Vec::new(),
        };
        for (place, row) in chosen.into_iter().enumerate() {
            let mut start = 0;
            for number in row {
                let example = self.examples.get(number);
                start = batch.inputs.len() - place * width;
                if let Some(fields) = &example.fields {
                    batch.tags.push(Tag { row: place, start, len: example.inputs.len(), fields: fields.clone() });
                }
                batch.inputs.extend(&example.inputs);
                batch.targets.extend(&example.targets);
                batch.starts.resize(batch.inputs.len(), start as i32);
            }
            batch.inputs.resize((place + 1) * width, self.fill);
            batch.targets.resize((place + 1) * width, IGNORE);
            batch.starts.resize((place + 1) * width, start as i32);
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::{Example, Fields, epoch};

    /// Examples of these lengths; the tokens identify the example.
    fn examples(lengths: &[usize]) -> Vec<Example> {
        let example = |(number, len): (usize, &usize)| Example {
            inputs: vec![number as i32 + 1; *len],
            targets: vec![number as i32 + 1; *len],
            fields: None,
        };
        lengths.iter().enumerate().map(example).collect()
    }

    #[test]
    fn rows_are_filled_up_at_the_end_and_nothing_there_counts() {
        let rows = Rows::new(examples(&[2, 4, 1]), 2, 9);
        let batches: Vec<Batch> = epoch(&rows).map(Result::unwrap).collect();
        assert_eq!(batches.len(), 2);
        assert_eq!(batches[0].inputs, [1, 1, 9, 9, 2, 2, 2, 2]);
        assert_eq!(batches[0].targets, [1, 1, IGNORE, IGNORE, 2, 2, 2, 2]);
        assert_eq!(batches[0].starts, [0; 8]);
        assert_eq!((batches[1].batch, batches[1].inputs.as_slice()), (1, &[3][..]));
    }

    #[test]
    fn packed_rows_hold_every_example_once_within_their_width() {
        let lengths: Vec<usize> = (0..100).map(|i| 1 + (i * 37) % 16).collect();
        let rows = Rows::new(examples(&lengths), 3, 0).packed(16, 4);
        let total: usize = lengths.iter().sum();
        assert!(rows.rows() as usize <= total.div_ceil(16) + 8, "{} rows for {total} tokens", rows.rows());
        let mut seen = vec![0; lengths.len()];
        for batch in epoch(&rows) {
            let batch = batch.unwrap();
            assert!(batch.seq_len <= 16);
            for (row, inputs) in batch.inputs.chunks(batch.seq_len).enumerate() {
                for (at, token) in inputs.iter().enumerate().filter(|(_, token)| **token != 0) {
                    seen[*token as usize - 1] += 1;
                    let start = batch.starts[row * batch.seq_len + at] as usize;
                    assert!(start <= at && inputs[start] == *token, "attention stays inside an example");
                    assert!(start == 0 || inputs[start - 1] != *token);
                }
            }
        }
        assert_eq!(seen, lengths);
    }

    #[test]
    fn rows_name_the_examples_that_have_fields() {
        let mut examples = examples(&[2, 3, 1]);
        let fields = |label: &str| Arc::new(Fields::from_iter([("label".to_string(), label.into())]));
        examples[0].fields = Some(fields("a"));
        examples[2].fields = Some(fields("b"));
        let batch = Rows::new(examples.clone(), 3, 0).at(0).unwrap();
        let places: Vec<[usize; 3]> = batch.tags.iter().map(|tag| [tag.row, tag.start, tag.len]).collect();
        assert_eq!(places, [[0, 0, 2], [2, 0, 1]]);
        let packed = Rows::new(examples, 3, 0).packed(6, 1).at(0).unwrap();
        assert_eq!(packed.batch, 1);
        for tag in &packed.tags {
            let token = if tag.fields["label"] == "a" { 1 } else { 3 };
            assert!(packed.inputs[tag.start..tag.start + tag.len].iter().all(|found| *found == token));
        }
    }

    #[test]
    fn an_epoch_sees_every_row_and_any_position_continues_the_same_stream() {
        let rows = Rows::new(examples(&[1; 10]), 4, 0).shuffled(7);
        let single = Rows { batch: 1, ..rows.clone() };
        let stream: Vec<i32> = (0..20).map(|position| single.at(position).unwrap().inputs[0]).collect();
        for epoch in stream.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (1..=10).collect::<Vec<_>>());
        }
        assert_ne!(stream[..10], stream[10..]);
        assert_eq!(rows.at(8).unwrap().inputs, stream[8..12]);
    }
}
