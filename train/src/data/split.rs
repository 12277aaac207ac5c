//! Selection of the held-out text.

use sha2::{Digest, Sha256};

use super::{DataError, Document, HeldOut, Progress, Source, Stage};

/// Split of the text into training and validation.
///
/// The side of a document depends only on the seed and its own text: it does not change when others are added, removed
/// or moved, and copies of a document stay together.
pub(super) struct Split {
    seed: u64,
    rule: Rule,
    /// Bytes of text in all documents.
    pub(super) bytes: u64,
}

enum Rule {
    /// Documents with a hash below this are for validation.
    Below(u128),
    /// The only document is for training up to this byte, and for validation after it.
    Cut(usize),
    /// All documents are on one side.
    Whole { validation: bool },
}

/// Parts of a document.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parts<'a> {
    pub(super) train: Option<&'a str>,
    pub(super) validation: Option<&'a str>,
}

impl Split {
    /// Reads the data once and chooses a fraction of the documents for validation, but at least one, and at least one
    /// for training. A single document is split at a line end.
    pub(super) fn scan(
        source: &Source,
        held_out: &HeldOut,
        seed: u64,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, DataError> {
        if let HeldOut::Fraction(fraction) = held_out {
            check(*fraction)?;
        }
        let mut documents = source.documents()?;
        let (mut count, mut bytes) = (0u64, 0u64);
        let (mut lowest, mut highest) = (u64::MAX, 0);
        // Set while there is only one document.
        let mut first: Option<Document> = None;
        for document in &mut documents {
            let document = document?;
            count += 1;
            bytes += document.text.len() as u64;
            let (hash, _) = hashes(seed, &document.text);
            lowest = lowest.min(hash);
            highest = highest.max(hash);
            first = (count == 1).then_some(document);
            progress(Progress { stage: Stage::Scan, done: bytes, total: 0 });
        }
        let rule = match first {
            _ if count == 0 => {
                let paths: Vec<String> = source.paths.iter().take(3).map(|path| path.display().to_string()).collect();
                let more = if source.paths.len() > 3 { " and others" } else { "" };
                return Err(DataError::Empty {
                    paths: paths.join(", ") + more,
                    skipped: documents.skipped.to_string(),
                });
            }
            first => match (held_out, first) {
                (HeldOut::Everything, _) => Rule::Whole { validation: true },
                (HeldOut::Source(_), _) => Rule::Whole { validation: false },
                (HeldOut::Fraction(fraction), Some(only)) => Rule::Cut(cut(&only, *fraction)?),
                (HeldOut::Fraction(_), None) if lowest == highest => {
                    return Err(DataError::Split {
                        problem: format!("all {count} documents have the same text; give more data"),
                    });
                }
                (HeldOut::Fraction(fraction), None) => Rule::Below(limit(*fraction, lowest, highest)),
            },
        };
        Ok(Self { seed, rule, bytes })
    }

    pub(super) fn parts<'a>(&self, document: &'a Document) -> Result<Parts<'a>, DataError> {
        let text = document.text.as_str();
        let whole =
            |validation: bool| Parts { train: (!validation).then_some(text), validation: validation.then_some(text) };
        match self.rule {
            Rule::Whole { validation } => Ok(whole(validation)),
            Rule::Below(limit) => Ok(whole(u128::from(hashes(self.seed, text).0) < limit)),
            Rule::Cut(at) => match text.split_at_checked(at) {
                Some((train, validation)) => Ok(Parts { train: Some(train), validation: Some(validation) }),
                None => Err(changed(&document.name)),
            },
        }
    }

    /// Returns true if a document belongs to a random sample of about `bytes` bytes of all text.
    pub(super) fn samples(&self, document: &Document, bytes: u64) -> bool {
        let share = bytes as f64 / self.bytes as f64;
        (hashes(self.seed, &document.text).1 as f64) < share * 2f64.powi(64)
    }
}

/// Hash of a text that determines whether it is held out.
pub(super) fn text_hash(seed: u64, text: &str) -> u64 {
    hashes(seed, text).0
}

/// Selects the held-out texts by the rule of documents; `hashes` are those of [`text_hash`].
pub(super) fn held_out(hashes: &[u64], fraction: f64) -> Result<Vec<bool>, DataError> {
    check(fraction)?;
    let (lowest, highest) = hashes.iter().fold((u64::MAX, 0), |(low, high), hash| (low.min(*hash), high.max(*hash)));
    if hashes.is_empty() || lowest == highest {
        let problem = format!("there are {} examples, all the same; give at least two that differ", hashes.len());
        return Err(DataError::Split { problem });
    }
    let limit = limit(fraction, lowest, highest);
    Ok(hashes.iter().map(|hash| u128::from(*hash) < limit).collect())
}

fn check(fraction: f64) -> Result<(), DataError> {
    match fraction > 0.0 && fraction < 1.0 {
        true => Ok(()),
        false => Err(DataError::Setting {
            key: "data.validation_fraction",
            value: fraction.to_string(),
            problem: "it must be between 0 and 1; name a file to measure on with data.validation to set nothing aside"
                .into(),
        }),
    }
}

/// Limit below which hashes are held out: about `fraction` of all, but at least one, and not all.
fn limit(fraction: f64, lowest: u64, highest: u64) -> u128 {
    let wanted = (fraction * 2f64.powi(64)) as u128;
    wanted.clamp(u128::from(lowest) + 1, u128::from(highest))
}

/// Error for data that changed while it was read.
pub(super) fn changed(name: &str) -> DataError {
    DataError::Split { problem: format!("{name} was changed while it was being read; start again when it is complete") }
}

/// Two independent random numbers from the seed and a text: for the split, and for the sample.
fn hashes(seed: u64, text: &str) -> (u64, u64) {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(text).finalize();
    let number = |from: usize| digest[from..from + 8].iter().rfold(0, |n, b| n << 8 | u64::from(*b));
    (number(0), number(8))
}

/// Position at which a single document is split: the last line end that leaves at least `fraction` of it, or else
/// between two characters.
fn cut(document: &Document, fraction: f64) -> Result<usize, DataError> {
    let text = &document.text;
    let wanted = ((1.0 - fraction) * text.len() as f64) as usize;
    let at = text.floor_char_boundary(wanted);
    let at = text[..at].rfind('\n').map_or(at, |line_end| line_end + 1);
    let second = text.char_indices().nth(1).map(|(i, _)| i);
    match second {
        Some(second) => Ok(at.max(second)),
        None => Err(DataError::Split { problem: format!("{} has a single character; give more data", document.name) }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    fn source(path: &Path) -> Source {
        Source { paths: vec![path.to_path_buf()], format: Format::Auto, field: "text".into() }
    }

    fn validation(folder: &Path, fraction: f64, seed: u64) -> BTreeSet<String> {
        let source = source(folder);
        let split = Split::scan(&source, &HeldOut::Fraction(fraction), seed, &mut |_| ()).unwrap();
        let mut chosen = BTreeSet::new();
        for document in source.documents().unwrap() {
            let document = document.unwrap();
            let parts = split.parts(&document).unwrap();
            assert_ne!(parts.train.is_some(), parts.validation.is_some());
            chosen.extend(parts.validation.map(str::to_owned));
        }
        chosen
    }

    #[test]
    fn a_side_depends_on_the_document_alone() {
        let dir = tempfile::tempdir().unwrap();
        let name = |i: usize| dir.path().join(format!("{i:03}.txt"));
        for i in 0..400 {
            fs::write(name(i), format!("document {i}")).unwrap();
        }
        let before = validation(dir.path(), 0.1, 3);
        assert!((20..=60).contains(&before.len()), "{}", before.len());
        assert_ne!(before, validation(dir.path(), 0.1, 4));
        fs::rename(name(7), dir.path().join("zzz.txt")).unwrap();
        fs::remove_file(name(8)).unwrap();
        fs::write(name(500), "another").unwrap();
        let after = validation(dir.path(), 0.1, 3);
        let differing: Vec<_> = before.symmetric_difference(&after).collect();
        assert!(differing.iter().all(|t| ["document 8", "another"].contains(&t.as_str())), "{differing:?}");
    }

    #[test]
    fn both_sides_get_a_document() {
        let dir = tempfile::tempdir().unwrap();
        for (i, text) in ["a", "b", "c"].iter().enumerate() {
            fs::write(dir.path().join(format!("{i}.txt")), text).unwrap();
        }
        for seed in 0..20 {
            assert_eq!(validation(dir.path(), 1e-9, seed).len(), 1);
            assert_eq!(validation(dir.path(), 1.0 - 1e-9, seed).len(), 2);
        }
        for bad in [0.0, -0.1, 1.0, f64::NAN] {
            assert!(Split::scan(&source(dir.path()), &HeldOut::Fraction(bad), 0, &mut |_| ()).is_err());
        }
        for i in 0..3 {
            fs::write(dir.path().join(format!("{i}.txt")), "same").unwrap();
        }
        assert!(Split::scan(&source(dir.path()), &HeldOut::Fraction(0.1), 0, &mut |_| ()).is_err());
        for i in 0..3 {
            fs::write(dir.path().join(format!("{i}.txt")), "").unwrap();
        }
        let error = Split::scan(&source(dir.path()), &HeldOut::Fraction(0.1), 0, &mut |_| ()).err().unwrap();
        assert!(error.to_string().contains("3 empty documents"), "{error}");
    }

    #[test]
    fn a_single_document_is_cut_at_a_line_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("only.txt");
        let cases = [
            ("one\ntwo\nthree\nfour\n", 0.3, "one\ntwo\n"),
            ("ééééé", 0.5, "éé"),
            ("no line end", 0.99, "n"),
            ("ab", 0.01, "a"),
            ("a\n", 0.01, "a"),
        ];
        for (text, fraction, train) in cases {
            fs::write(&path, text).unwrap();
            let split = Split::scan(&source(&path), &HeldOut::Fraction(fraction), 0, &mut |_| ()).unwrap();
            let document = source(&path).documents().unwrap().next().unwrap().unwrap();
            let parts = split.parts(&document).unwrap();
            assert_eq!(parts.train, Some(train));
            assert_eq!(parts.validation, Some(&text[train.len()..]));
        }
        fs::write(&path, "é").unwrap();
        assert!(Split::scan(&source(&path), &HeldOut::Fraction(0.1), 0, &mut |_| ()).is_err());
    }
}
