//! Many examples in little memory.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::example::Example;
use crate::data::{DataError, Fields, IGNORE};

/// Examples whose tokens lie one after another: in memory while they are few, otherwise in an unnamed file that is mapped, of which the system
/// keeps in memory what is in use.
///
/// Clones and selections share the tokens.
#[derive(Clone, Debug, Default)]
pub struct ExampleList {
    tokens: Arc<Tokens>,
    entries: Vec<Entry>,
}

/// Tokens in 4 bytes each: the id, and in the highest bit whether it is trained on.
#[derive(Debug)]
enum Tokens {
    Memory(Vec<u8>),
    Mapped(Mmap),
}

impl Default for Tokens {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

impl Tokens {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Memory(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }
}

/// Place of an example.
#[derive(Clone, Debug)]
struct Entry {
    /// Number of the first token.
    begin: u64,
    /// Number of inputs; one token more is stored.
    len: u32,
    fields: Option<Arc<Fields>>,
}

const LEARNED: u32 = 1 << 31;

impl ExampleList {
    /// Number of examples.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns true if there are no examples.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of inputs of an example.
    pub fn inputs(&self, number: usize) -> usize {
        self.entries[number].len as usize
    }

    /// An example.
    pub fn get(&self, number: usize) -> Example {
        let Entry { begin, len, fields } = &self.entries[number];
        let (begin, len) = (*begin as usize, *len as usize);
        let words = self.tokens.bytes()[4 * begin..4 * (begin + len + 1)].as_chunks::<4>().0;
        let id = |word: &[u8; 4]| (u32::from_le_bytes(*word) & !LEARNED) as i32;
        let target = |word: &[u8; 4]| if u32::from_le_bytes(*word) & LEARNED == 0 { IGNORE } else { id(word) };
        Example {
            inputs: words[..len].iter().map(id).collect(),
            targets: words[1..].iter().map(target).collect(),
            fields: fields.clone(),
        }
    }

    /// The examples in order.
    pub fn iter(&self) -> impl Iterator<Item = Example> {
        (0..self.len()).map(|number| self.get(number))
    }

    /// The examples for whose numbers `chosen` is true.
    pub fn select(&self, mut chosen: impl FnMut(usize) -> bool) -> Self {
        let entries = self.entries.iter().enumerate().filter(|(number, _)| chosen(*number));
        Self { tokens: self.tokens.clone(), entries: entries.map(|(_, entry)| entry.clone()).collect() }
    }
}

impl PartialEq for ExampleList {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for ExampleList {}

impl From<Vec<Example>> for ExampleList {
    fn from(examples: Vec<Example>) -> Self {
        let (mut bytes, mut entries) = (Vec::new(), Vec::new());
        for example in examples {
            entries.push(Entry::of(&example, (bytes.len() / 4) as u64));
            store(&example, &mut bytes);
        }
        Self { tokens: Arc::new(Tokens::Memory(bytes)), entries }
    }
}

impl Entry {
    fn of(example: &Example, begin: u64) -> Self {
        Self { begin, len: example.inputs.len() as u32, fields: example.fields.clone() }
    }
}

/// Appends the tokens of an example.
fn store(example: &Example, bytes: &mut Vec<u8>) {
    let Example { inputs, targets, .. } = example;
    for place in 0..=inputs.len() {
        let target = place.checked_sub(1).and_then(|before| targets.get(before)).filter(|target| **target != IGNORE);
        let word = match target {
            Some(id) => *id as u32 | LEARNED,
            None => inputs.get(place).map_or(0, |id| *id as u32),
        };
        bytes.extend(word.to_le_bytes());
    }
}

/// Collects examples.
pub(super) struct ExampleWriter<'a> {
    /// Folder of the file, which is made if it is needed.
    folder: &'a Path,
    entries: Vec<Entry>,
    /// Number of all tokens so far.
    count: u64,
    /// Tokens that are not in the file.
    bytes: Vec<u8>,
    file: Option<BufWriter<File>>,
}

/// Bytes of tokens that stay in memory.
const IN_MEMORY: usize = 16 << 20;

impl<'a> ExampleWriter<'a> {
    pub fn new(folder: &'a Path) -> Self {
        Self { folder, entries: Vec::new(), count: 0, bytes: Vec::new(), file: None }
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn push(&mut self, example: &Example) -> Result<(), DataError> {
        self.push_within(example, IN_MEMORY)
    }

    fn push_within(&mut self, example: &Example, most: usize) -> Result<(), DataError> {
        self.entries.push(Entry::of(example, self.count));
        self.count += example.inputs.len() as u64 + 1;
        store(example, &mut self.bytes);
        if self.bytes.len() > most || self.file.is_some() {
            let folder = self.folder;
            let file = match &mut self.file {
                Some(file) => file,
                None => {
                    fs::create_dir_all(folder).map_err(DataError::write(folder))?;
                    let file = tempfile::tempfile_in(folder).map_err(DataError::write(folder))?;
                    self.file.insert(BufWriter::with_capacity(1 << 20, file))
                }
            };
            file.write_all(&self.bytes).map_err(DataError::write(folder))?;
            // The first part was large.
            self.bytes = Vec::new();
        }
        Ok(())
    }

    pub fn finish(self) -> Result<ExampleList, DataError> {
        let tokens = match self.file {
            None => Tokens::Memory(self.bytes),
            Some(file) => {
                let file = file.into_inner().map_err(|error| error.into_error());
                // SAFETY: the file has no name, so that no other program writes or truncates it.
                let map = file.and_then(|file| unsafe { Mmap::map(&file) }).map_err(DataError::write(self.folder))?;
                Tokens::Mapped(map)
            }
        };
        Ok(ExampleList { tokens: Arc::new(tokens), entries: self.entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_come_back_as_they_were_from_memory_and_from_a_file() {
        let example = |number: i32| {
            let len = 1 + number as usize % 7;
            let ids: Vec<i32> = (0..=len as i32).map(|place| 131 * number + place).collect();
            let target =
                |(place, id): (usize, &i32)| if (place + number as usize).is_multiple_of(3) { IGNORE } else { *id };
            let fields = Arc::new(Fields::from_iter([("number".to_string(), number.into())]));
            Example {
                inputs: ids[..len].to_vec(),
                targets: ids[1..].iter().enumerate().map(target).collect(),
                fields: (number % 5 == 0).then_some(fields),
            }
        };
        let expected: Vec<Example> = (0..200).map(example).collect();
        let folder = tempfile::tempdir().expect("a folder");
        let inner = folder.path().join("cache");
        for most in [0, 500, usize::MAX] {
            let mut writer = ExampleWriter::new(&inner);
            expected.iter().for_each(|example| writer.push_within(example, most).expect("it is written"));
            let list = writer.finish().expect("it is mapped");
            assert!(list.iter().eq(expected.iter().cloned()), "{most}");
            assert_eq!(list, ExampleList::from(expected.clone()));
            let odd = list.select(|number| number % 2 == 1);
            assert!(odd.iter().eq(expected.iter().skip(1).step_by(2).cloned()));
            assert_eq!(list.inputs(6), expected[6].inputs.len());
        }
        assert_eq!(fs::read_dir(&inner).expect("it was made").count(), 0, "the file has no name");
    }
}
