//! All examples of the data.

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::encode::{Encoder, Made};
use super::list::{ExampleList, ExampleWriter};
use super::options::ExampleOptions;
use crate::data::json_lines::JsonLines;
use crate::data::split::{held_out, text_hash};
use crate::data::{DataError, Format, HeldOut, Source};

/// All examples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examples {
    /// Training examples.
    pub train: ExampleList,
    /// Held-out examples.
    pub validation: ExampleList,
    /// Number of truncated examples.
    pub truncated: usize,
    /// Number of examples left out for their length.
    pub dropped: usize,
}

/// Maximum number of lines, and of bytes, that are tokenized together.
const TOGETHER: usize = 4096;
const BYTES_TOGETHER: usize = 8 << 20;

impl Examples {
    /// Reads all examples. Rejects a line that is not an example or has nothing to train on, with file and line.
    pub fn read(options: &ExampleOptions) -> Result<Self, DataError> {
        let mut read = Read::of(options.source, options)?;
        let mut examples = Self { truncated: read.truncated, dropped: read.dropped, ..Self::default() };
        match options.held_out {
            HeldOut::Everything => examples.validation = read.examples,
            HeldOut::Source(source) => {
                let other = Read::of(source, options)?;
                examples.truncated += other.truncated;
                examples.dropped += other.dropped;
                (examples.train, examples.validation) = (read.examples, other.examples);
            }
            HeldOut::Fraction(fraction) => {
                let sides = held_out(&std::mem::take(&mut read.hashes), *fraction)?;
                examples.validation = read.examples.select(|number| sides[number]);
                examples.train = read.examples.select(|number| !sides[number]);
            }
        }
        Ok(examples)
    }

    /// SHA-256 of the training examples in hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.train)
    }

    /// SHA-256 of the held-out examples in hexadecimal digits.
    pub fn held_out_fingerprint(&self) -> String {
        fingerprint(&self.validation)
    }
}

fn fingerprint(examples: &ExampleList) -> String {
    let mut hasher = Sha256::new();
    for example in examples.iter() {
        hasher.update((example.inputs.len() as u64).to_le_bytes());
        for value in example.inputs.iter().chain(&example.targets) {
            hasher.update(value.to_le_bytes());
        }
    }
    format!("{:x}", hasher.finalize())
}

/// Examples of one source, in order.
#[derive(Default)]
struct Read {
    examples: ExampleList,
    /// Hash of each line, which determines whether it is held out.
    hashes: Vec<u64>,
    truncated: usize,
    dropped: usize,
}

impl Read {
    fn of(source: &Source, options: &ExampleOptions) -> Result<Self, DataError> {
        if !matches!(source.format, Format::Auto | Format::Jsonl) {
            return Err(DataError::Setting {
                key: "data.format",
                value: format!("{:?}", source.format).to_lowercase(),
                problem: "examples to fine-tune on are JSON lines; set it to jsonl".into(),
            });
        }
        let encoder = Encoder::new(options);
        let mut read = Self::default();
        let mut examples = ExampleWriter::new(options.cache);
        let mut lines_read = 0;
        for (path, _) in source.files()?.0 {
            let mut lines = JsonLines::open(path)?;
            loop {
                let (mut group, mut bytes) = (Vec::new(), 0);
                while group.len() < TOGETHER
                    && bytes < BYTES_TOGETHER
                    && let Some((line, value)) = lines.next_value()?
                {
                    let text = value.sorted_text();
                    bytes += text.len();
                    group.push((line, value, text_hash(options.seed, &text)));
                }
                if group.is_empty() {
                    break;
                }
                lines_read += group.len();
                let path = lines.path();
                let made: Vec<Result<Made, DataError>> =
                    group.par_iter().map(|(line, value, _)| encoder.example(value, path, *line)).collect();
                for ((_, _, hash), made) in group.iter().zip(made) {
                    let example = match made? {
                        Made::Whole(example) => example,
                        Made::Cut(example) => {
                            read.truncated += 1;
                            example
                        }
                        Made::Dropped => {
                            read.dropped += 1;
                            continue;
                        }
                    };
                    examples.push(&example)?;
                    read.hashes.push(*hash);
                }
            }
        }
        let empty = |skipped: String| {
            let paths: Vec<String> = source.paths.iter().map(|path| path.display().to_string()).collect();
            Err(DataError::Empty { paths: paths.join(", "), skipped })
        };
        match (lines_read, examples.len()) {
            (0, _) => empty("there is no line".into()),
            (all, 0) => {
                empty(format!("all {all} examples are longer than {} = {}", options.length_key, options.seq_len))
            }
            _ => Ok(Self { examples: examples.finish()?, ..read }),
        }
    }
}
