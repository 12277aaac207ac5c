//! Text files of any length.

use std::io::Read;
use std::path::PathBuf;

use super::open::{Reader, open};
use super::{DataError, Document};

/// Maximum size of a document in bytes: a larger text file is split at line ends, since it need not fit in memory and
/// encoding a text takes about 200 times its size.
pub(super) const PIECE: usize = 1 << 20;

/// Reads the text of a file in pieces that end with a line.
pub(super) struct TextReader {
    path: PathBuf,
    file: Reader,
    /// Text that was read but not yet returned.
    rest: Vec<u8>,
    offset: u64,
    pieces: u64,
    limit: usize,
    done: bool,
}

impl TextReader {
    /// Opens a file; `None` for a binary file found in a folder. Reads the file twice, so that a binary one is
    /// recognised before its first piece.
    pub(super) fn open(path: PathBuf, named: bool, limit: usize) -> Result<Option<Self>, DataError> {
        let file = match open(&path) {
            Err(DataError::Encoding { .. }) if !named => return Ok(None),
            file => file?,
        };
        let bad = match first_bad_byte(file, !named) {
            // A damaged archive in a folder is not text.
            Err(_) if !named => return Ok(None),
            bad => bad.map_err(DataError::read(&path))?,
        };
        match bad {
            Some(offset) if named => Err(DataError::NotUtf8 { path, offset }),
            Some(_) => Ok(None),
            None => {
                let file = open(&path)?;
                Ok(Some(Self { file, path, rest: Vec::new(), offset: 0, pieces: 0, limit, done: false }))
            }
        }
    }

    /// Returns the next piece.
    pub(super) fn next(&mut self) -> Result<Option<Document>, DataError> {
        if self.done {
            return Ok(None);
        }
        let mut bytes = std::mem::take(&mut self.rest);
        let room = (self.limit - bytes.len()) as u64 + 1;
        (&mut self.file).take(room).read_to_end(&mut bytes).map_err(DataError::read(&self.path))?;
        if bytes.len() <= self.limit {
            self.done = true;
        } else {
            let head = &bytes[..self.limit];
            let cut = match head.iter().rposition(|&b| b == b'\n') {
                Some(line_end) => line_end + 1,
                // A line longer than a piece is split between two characters.
                None => match std::str::from_utf8(head) {
                    Ok(_) => self.limit,
                    Err(e) => e.valid_up_to().max(1),
                },
            };
            self.rest = bytes.split_off(cut);
        }
        let read = bytes.len() as u64;
        let text = String::from_utf8(bytes).map_err(|e| DataError::NotUtf8 {
            path: self.path.clone(),
            offset: self.offset + e.utf8_error().valid_up_to() as u64,
        })?;
        self.offset += read;
        self.pieces += 1;
        let name = match self.pieces {
            1 => self.path.display().to_string(),
            n => format!("{} part {n}", self.path.display()),
        };
        Ok(Some(Document { name, text }))
    }
}

/// Position of the first byte that is not UTF-8, or, if requested, is zero.
fn first_bad_byte(mut reader: impl Read, refuse_zero: bool) -> std::io::Result<Option<u64>> {
    let mut buffer = vec![0; 1 << 16];
    let (mut kept, mut offset) = (0, 0u64);
    loop {
        let read = match reader.read(&mut buffer[kept..]) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        let filled = kept + read;
        let valid = match std::str::from_utf8(&buffer[..filled]) {
            Ok(_) => filled,
            // The end may be an incomplete character.
            Err(e) if e.error_len().is_none() && read > 0 => e.valid_up_to(),
            Err(e) => return Ok(Some(offset + e.valid_up_to() as u64)),
        };
        if refuse_zero && let Some(zero) = buffer[..valid].iter().position(|&b| b == 0) {
            return Ok(Some(offset + zero as u64));
        }
        if read == 0 {
            return Ok(None);
        }
        buffer.copy_within(valid..filled, 0);
        kept = filled - valid;
        offset += valid as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_are_cut_at_line_ends_without_loss() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long.txt");
        for text in ["one\ntwo\nthree\nfour\n", "äöüäöüäöüäöü", "abcdefgh", "ab\ncdefghijklmnop\nq", "é"] {
            std::fs::write(&path, text).unwrap();
            let mut reader = TextReader::open(path.clone(), true, 9).unwrap().unwrap();
            let mut all = String::new();
            while let Some(document) = reader.next().unwrap() {
                assert!(document.text.len() <= 9 && !document.text.is_empty());
                all += &document.text;
            }
            assert_eq!(all, text);
        }
    }

    #[test]
    fn bad_bytes_are_found_across_buffers() {
        for at in [0, 65_534, 65_535, 65_536, 70_000] {
            let mut bytes = vec![b'a'; 65_533];
            bytes.extend("äöü€𝄞".repeat(2000).bytes());
            assert_eq!(first_bad_byte(&bytes[..], true).unwrap(), None);
            let good = std::str::from_utf8(&bytes).unwrap();
            let at = (at..).find(|&i| good.is_char_boundary(i)).unwrap();
            for bad in [0, 0xff] {
                let mut bytes = bytes.clone();
                bytes.insert(at, bad);
                assert_eq!(first_bad_byte(&bytes[..], true).unwrap(), Some(at as u64));
                assert_eq!(first_bad_byte(&bytes[..], false).unwrap().is_none(), bad == 0);
            }
            bytes.truncate(at);
            bytes.push(0xe2);
            assert_eq!(first_bad_byte(&bytes[..], true).unwrap(), Some(at as u64));
        }
    }
}
